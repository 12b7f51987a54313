"""Which mesh and remat policy to take: those that divide, pruned by a cheap estimate of memory, compiled, ranked by
time."""

import math

import ml_collections

from moe_rl import config as configs
from moe_rl.models.config import REMAT
from moe_rl.models.transformer import parameter_count
from moe_rl.planner import programs
from moe_rl.planner.topologies import GIB, Topology, factors
from moe_rl.rl.objectives import chosen
from moe_rl.runtime.mesh import AXES

STATE_COPIES = 4  # of the weights: themselves, gradients, two moments; a reference is one more


def candidates(config, topology: Topology, prompt_tokens: int) -> list:
  """Configs (for planning) whose mesh divides what it shards, the most promising first: every mesh of the slice
  with every remat policy, less those whose state alone passes the HBM. Raises ValueError, with the last refusal, if
  none."""
  base = programs.for_planning(config, prompt_tokens)
  model, out, why = configs.model_config(base), [], ''
  copies = STATE_COPIES + (base.stage == 'rl' and chosen(base.rl).kl_weight > 0)
  state = copies * parameter_count(model) * (4 if model.param_dtype == 'float32' else 2)
  for sizes in factors(topology.devices, len(AXES)):
    mesh = dict(zip(AXES, sizes, strict=True))
    if state / sharded(mesh, model) > topology.generation.hbm_device:
      continue
    trial = ml_collections.ConfigDict(base.to_dict())
    trial.mesh.update(mesh)
    try:
      programs.check(trial, topology.devices)
    except ValueError as e:
      why = str(e)
      continue
    for remat in REMAT:
      each = ml_collections.ConfigDict(trial.to_dict())
      each.model.remat = remat
      out.append(each)
  if not out:
    raise ValueError(f'--suggest: no mesh of {topology.devices:,} devices both divides this experiment and holds its '
                     f'state of {state / GIB:,.0f} GiB ('
                     f'{topology.devices * topology.generation.hbm_device / GIB:,.0f} GiB in all)'
                     + (f'. The last refusal: {why}' if why else ''))
  return sorted(out, key=promise)


def sharded(mesh: dict, model) -> int:
  """Over how many devices most weights are spread, by the sharding table: experts are the most where there are any."""
  return mesh['fsdp'] * mesh['tensor'] * (mesh['expert'] if model.moe_layers else 1)


def promise(config) -> tuple:
  """What to compile first: rematerialisation as the config of a big model has it, weights spread wide, and little of
  tensor parallelism, whose collectives are the most frequent."""
  m = config.mesh
  return (REMAT[::-1].index(config.model.remat), m.tensor, m.data, -math.log2(m.fsdp), m.expert)


def suggest(config, topology: Topology, plan, *, tries: int, options: dict) -> list[dict]:
  """Plans of the most promising candidates, those that fit first, the fastest first. plan: `moe_rl.plan.plan`."""
  found = []
  for each in spread(candidates(config, topology, options['prompt_tokens']), tries):
    one = plan(each, topology, **options)
    run = one['run']
    found.append({'mesh': one['mesh'], 'remat': each.model.remat, 'fits': one['fits'],
                  'peak_bytes': max(p['peak_bytes'] for p in one['programs']),
                  'seconds_per_step': run['overlapped']['seconds_per_step'] if run else math.inf,
                  'seconds_per_step_apart': run['apart']['seconds_per_step'] if run else math.inf})
  return sorted(found, key=lambda f: (not f['fits'], f['seconds_per_step']))


def spread(configs_: list, tries: int) -> list:
  """The first of each mesh in turn, then further remat policies of the first meshes."""
  meshes = {}
  for c in configs_:
    meshes.setdefault(tuple(c.mesh[a] for a in AXES), []).append(c)
  rounds = [group[n] for n in range(len(REMAT)) for group in meshes.values() if n < len(group)]
  return rounds[:tries]


def table(found: list[dict]) -> str:
  lines = [f'{"mesh":<44} remat  GiB a device  s a step: overlapped, apart']
  for f in found:
    mesh = ' x '.join(f'{k}={v}' for k, v in f['mesh'].items())
    lines.append(f'{mesh:<44} {f["remat"]:<5}  {f["peak_bytes"] / GIB:>12.2f}  {f["seconds_per_step"]:.4g}, '
                 f'{f["seconds_per_step_apart"]:.4g}{"" if f["fits"] else "  DOES NOT FIT"}')
  return '\n'.join(lines)
