"""A plan as a table for people, and as JSON."""

import dataclasses

from moe_rl.planner.estimate import Row, by_kind
from moe_rl.planner.prices import API_PER_MILLION, H800_NODE_TOKENS_PER_SECOND
from moe_rl.planner.topologies import GIB, Topology
from moe_rl.runtime.programs import LOOPS


def as_json(topology: Topology, mesh: dict, rows: list[Row], run: dict, notes: list[str]) -> dict:
  """All bytes and FLOPs are a device's; a chip of this generation has `devices_per_chip`."""
  return {
    'topology': topology.name, 'chips': topology.chips, 'devices_per_chip': topology.generation.devices, 'mesh': mesh,
    'capacity_bytes': topology.generation.hbm_device, 'fits': all(r.fits for r in rows), 'assumptions': notes,
    'programs': [program(r, topology) for r in rows], 'run': run}


def program(r: Row, topology: Topology) -> dict:
  c = r.compiled
  out = {'name': c.name, 'fits': r.fits, 'peak_bytes': c.peak, 'memory': c.memory, 'resident_bytes': c.resident,
         'error': c.error, 'compiler': c.compiler, 'compile_seconds': c.seconds, 'code_generated': not c.cut,
         'loops_of_data_length': [dataclasses.asdict(x) for x in r.loops], 'runs_a_step': r.load.a_step}
  if r.work:
    overlapped, apart = r.utilisation(topology)
    out |= {'flops': r.work.flops, 'hbm_bytes': r.work.hbm, 'collectives': by_kind(r.work),
            'seconds': parts(r.seconds),
            'seconds_a_round': {'loop': r.round[0], **parts(r.round[1])} if r.round else None,
            'useful_flops': r.load.useful, 'utilisation': {'overlapped': overlapped, 'apart': apart}}
  return out


def parts(s) -> dict:
  return {'compute': s.compute, 'hbm': s.hbm, 'interconnect': s.interconnect, 'overlapped': s.overlapped,
          'apart': s.apart, 'bound': s.bound}


def text(plan: dict) -> str:
  """The printed form of `as_json`."""
  lines = [f'{plan["topology"]}: {plan["chips"]:,} chips, {plan["devices_per_chip"]} device(s) a chip, mesh '
           + ' x '.join(f'{k}={v}' for k, v in plan['mesh'].items()),
           f'bytes and FLOPs are a device\'s; HBM for programs {plan["capacity_bytes"] / GIB:.2f} GiB a device']
  lines += [f'assumed: {note}' for note in plan['assumptions']]
  for p in plan['programs']:
    lines += ['', *_program(p, plan['capacity_bytes'])]
  return '\n'.join(lines + _run(plan))


def _program(p: dict, capacity: float) -> list[str]:
  verdict = 'fits' if p['fits'] else 'DOES NOT FIT' if p['peak_bytes'] > capacity else 'FAILED'
  lines = [f'{p["name"]}: {verdict}, {p["peak_bytes"] / GIB:.2f} of {capacity / GIB:.2f} GiB (compiled in '
           f'{p["compile_seconds"]:.0f} s{"" if p["code_generated"] else ", without its code"})']
  kinds = {**p['memory'], 'rest of the state': p['resident_bytes']}
  if any(kinds.values()):
    lines.append('  HBM GiB      ' + ', '.join(f'{k} {v / GIB:.2f}' for k, v in kinds.items() if v))
  if p['error']:
    lines.append(f'  the compiler: {_first_words(p["error"])}')
  if 'seconds' not in p:
    return lines
  s, u = p['seconds'], p['utilisation']
  lines.append(f'  work         {p["flops"] / 1e12:,.3f} TFLOP, HBM {p["hbm_bytes"] / 1e9:,.3f} GB')
  lines += [f'  {kind:<19} {c["count"]:>9,.0f} x, received {c["received"] / 1e9:>11,.3f} GB, results '
            f'{c["results"] / 1e9:>11,.3f} GB' for kind, c in sorted(p['collectives'].items())]
  lines.append(f'  seconds      {_seconds(s)}')
  if told := p['compiler'].get('optimal_seconds'):
    lines.append(f'  the compiler {told:.4g} s, loops counted once' + (' (no estimate: opaque calls)' if told < 0
      else ''))
  if a_round := p['seconds_a_round']:
    lines.append(f'  {"a round of":<12} {a_round["loop"]}: {_seconds(a_round)}')
    lines.append('  rounds       ' + ', '.join(_rounds(x) for x in p['loops_of_data_length']))
  if p['useful_flops']:
    lines.append(f'  utilisation  {u["overlapped"]:.1%} overlapped, {u["apart"]:.1%} with nothing overlapped')
  return lines


def _rounds(x: dict) -> str:
  """A loop whose length is data: those that the programs do not name are told by where they stand."""
  return f'{x["name"] if x["name"] in LOOPS else x["source"]} {x["assumed"]:,.0f} ({x["certain"]})'


def _seconds(s: dict) -> str:
  return (f'{s["overlapped"]:.4g} overlapped ({s["bound"]}), {s["apart"]:.4g} apart: compute {s["compute"]:.4g}, HBM '
          f'{s["hbm"]:.4g}, interconnect {s["interconnect"]:.4g}')


def _run(plan: dict) -> list[str]:
  run = plan['run']
  if not run:
    return ['', 'the run: no estimate, as a program of its step has none']
  lines = ['', f'the run, {run["steps"]:,} steps at ${run["price_chip_hour"]:.2f} a chip-hour']
  for name, words in (('overlapped', 'all overlapped'), ('apart', 'nothing overlapped')):
    r = run[name]
    lines.append(f'  {words:<19} {r["seconds_per_step"]:,.4g} s a step, '
                 f'{r["tokens_per_second_per_chip"]:,.4g} tokens/s a chip, '
                 f'{r["chip_hours"]:,.4g} chip-hours, ${r["dollars"]:,.4g}')
    if 'sampled_tokens_per_second' in r:
      lines.append(f'  {"":<19} rollout {r["sampled_tokens_per_second"]:,.4g} tokens/s, '
                   f'${r["dollars_per_million_sampled_tokens"]:,.4g} per million output tokens')
  if 'sampled_tokens_per_second' in run['apart']:
    asked = ', '.join(f'{k} ${v:.2f}' for k, v in API_PER_MILLION.items())
    lines.append(f'  yardsticks: asked per million output tokens {asked}; '
                 f'{H800_NODE_TOKENS_PER_SECOND:,} output tokens/s on 8 H800')
  return lines


def _first_words(error: str) -> str:
  """Of a compiler's message, which may begin with a line that is only its number."""
  return ' '.join(error.split())[:300]


def remedy(plan: dict) -> str:
  """For each program that does not fit: by how much, and what to do. '' if all fit."""
  out = []
  for p in plan['programs']:
    over = p['peak_bytes'] - plan['capacity_bytes']
    if over > 0:
      out.append(f'{p["name"]} needs {over / GIB:.2f} GiB a device more than there is: take more chips, shard weights '
                 'further (config.mesh.fsdp, expert, tensor), lower microbatch_rows or prompts_per_step, '
                 'or set config.model.remat=full')
    elif not p['fits']:
      why = _first_words(p['error']) if p['error'] else 'the compiler left no account of its memory'
      out.append(f'{p["name"]} could not be compiled: {why}')
  return '\n'.join(out)
