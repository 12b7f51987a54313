"""Which mesh and remat policy to take: those that divide, pruned by what must lie in memory, compiled, ranked by time.

Compiles are dear, so few are made: meshes first, with the remat policy that takes the least memory, then the other
policies on the best mesh. Of a stage only the programs that a step consists of are compiled, without their code.
"""

import dataclasses
import math
import time

import ml_collections

from moe_rl import config as configs
from moe_rl.models.config import REMAT
from moe_rl.planner import programs
from moe_rl.planner.topologies import GIB, Topology, factors
from moe_rl.rl.objectives import chosen
from moe_rl.runtime.mesh import AXES

MAIN = {'rl': ('rollout', 'scoring', 'GRPO update'), 'pretrain': ('pretrain update',)}  # a step, by stage
PATIENCE = 5.0  # seconds for code generation, which changes no number that is ranked


@dataclasses.dataclass(frozen=True)
class Candidate:
  """config: for planning, its mesh set; least: bytes a device that it cannot do with less than."""

  config: ml_collections.ConfigDict
  least: float

  def with_remat(self, remat: str) -> 'Candidate':
    config = ml_collections.ConfigDict(self.config.to_dict())
    config.model.remat = remat
    return Candidate(config, self.least)


def candidates(config, topology: Topology, prompt_tokens: int) -> list[Candidate]:
  """One for every mesh of the slice that divides what it shards and holds what must lie in memory, the most promising
  first, with full remat. Raises ValueError, with the last refusal, if there is none."""
  base = programs.for_planning(config, prompt_tokens)
  base.model.remat = REMAT[-1]
  shapes, out, why, least = state_shapes(base), [], '', math.inf
  for sizes in factors(topology.devices, len(AXES)):
    trial = ml_collections.ConfigDict(base.to_dict())
    trial.mesh.update(dict(zip(AXES, sizes, strict=True)))
    try:
      _, sized = programs.check(trial, topology.devices)
    except ValueError as e:
      why = f'. The last refusal: {e}'
      continue
    out.append(Candidate(trial, least_bytes(sized, sizes, shapes)))
    least = min(least, out[-1].least)
  holds = topology.generation.hbm_device
  if least > holds:
    least = f'; of those that divide it, the best needs {least / GIB:,.1f} GiB a device' if out else ''
    raise ValueError(f'--suggest: no mesh of {topology.devices:,} devices both divides this experiment and fits '
                     f'{holds / GIB:.2f} GiB a device{least}{why}: take more chips, or lower prompts_per_step, '
                     'group_size, max_new_tokens')
  return sorted((c for c in out if c.least <= holds), key=promise)


def promise(candidate: Candidate) -> tuple:
  """Little of tensor parallelism, whose collectives are the most frequent; then what leaves memory for fewer, larger
  microbatches and keeps fewer copies."""
  m = candidate.config.mesh
  return m.tensor, candidate.least, m.data


def state_shapes(config) -> tuple:
  """(the run's state with its logical axes, the sampler's weights or None) of shapes alone."""
  import jax

  from moe_rl.models import transformer
  from moe_rl.runtime.state import make_optimizer, make_state
  model = dataclasses.replace(configs.model_config(config), mtp_layers=0) if config.stage == 'rl' else (
    configs.model_config(config))
  reference = config.stage == 'rl' and chosen(config.rl).kl_weight > 0 and config.rl.reference_memory == 'device'
  state = jax.eval_shape(
    lambda: make_state(model, make_optimizer(config, config[config.stage].steps), jax.random.key(0), reference))
  if config.stage != 'rl':
    return state, None
  return state, jax.eval_shape(lambda: transformer.for_compute(model, transformer.init(
    model, jax.random.key(0))['params']))


def least_bytes(config, sizes: tuple[int, ...], shapes: tuple) -> float:
  """Bytes a device that lie in HBM at once whatever the compiler does. In training the state and a gradient; in
  sampling the state, the sampler's weights and the cache. config: with its lengths."""
  import jax
  from jax.sharding import AbstractMesh

  from moe_rl.runtime import mesh as meshes
  mesh, (state, sampler) = AbstractMesh(sizes, AXES), shapes

  def held(tree, rules=None):
    placed = jax.tree.leaves(meshes.shardings(tree, mesh, rules))
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
               for x, s in zip(jax.tree.leaves(tree), placed, strict=True))
  training = held(state) + held(state.params)
  if sampler is None:
    return training
  model, r, s = configs.model_config(config), config.rl, config.sampling
  whole, rows, tensor = r.prompts_per_step, meshes.rows_over(mesh.shape), mesh.shape['tensor']
  cells = whole / rows * (s.max_prompt_tokens + r.group_size * s.max_new_tokens
                          / (tensor if r.group_size % tensor == 0 else 1))
  cache = cells * model.layers * model.latent_dim * jax.numpy.dtype(model.compute_dtype).itemsize
  return max(training, held(state) + held(sampler, meshes.SAMPLING) + cache)


def suggest(config, topology: Topology, plan, *, tries: int, minutes: float, options: dict) -> dict:
  """{'suggestions': candidates that were compiled, those that fit first, the fastest first; 'not_tried': how many
  meshes were left}. plan: `moe_rl.plan.plan`; minutes: after which no further candidate is begun."""
  meshes = candidates(config, topology, options['prompt_tokens'])
  policies = [r for r in REMAT[::-1] if r != REMAT[-1]][:tries // 3]
  found, ends = [], time.time() + 60 * minutes

  def measure(candidate: Candidate):
    config = candidate.config
    at = f'{len(found) + 1} of at most {tries}: {mesh_text(config.mesh)}, remat {config.model.remat}'

    def progress(what, seconds):
      options['progress'](f'{at}: {what}', seconds)
    one = plan(config, topology, only=MAIN[config.stage],
               **options | {'patience': min(PATIENCE, options['patience']), 'progress': progress})
    found.append(record(one, candidate))
  explored = meshes[:tries - len(policies)]
  for candidate in explored:
    if not found or time.time() < ends:
      measure(candidate)
  if best := next((f for f in ranked(found) if f['fits']), None):
    start = next(c for c in explored if mesh_of(c.config) == best['mesh'])
    for remat in policies:  # each keeps more than the one before
      if time.time() < ends and (found[-1]['fits'] or found[-1]['remat'] == REMAT[-1]):
        measure(start.with_remat(remat))
  left = len(meshes) - sum(f['remat'] == REMAT[-1] for f in found)
  return {'suggestions': ranked(found), 'meshes_left': left}


def mesh_of(config) -> dict[str, int]:
  return {a: config.mesh[a] for a in AXES}


def mesh_text(mesh) -> str:
  return ' x '.join(f'{a}={mesh[a]}' for a in AXES)


def record(plan: dict, candidate: Candidate) -> dict:
  """What a candidate's plan says of a step. Seconds are None where a program has no estimate."""
  used = [p for p in plan['programs'] if p['runs_a_step']]
  timed = all('seconds' in p for p in used)

  def seconds(of):
    return sum(p['runs_a_step'] * p['seconds'][of] for p in used) if timed else None
  worst = max(plan['programs'], key=lambda p: p['peak_bytes'])
  return {'mesh': mesh_of(candidate.config), 'remat': candidate.config.model.remat, 'fits': plan['fits'],
          'peak_bytes': worst['peak_bytes'], 'peak_of': worst['name'], 'least_bytes': candidate.least,
          'seconds_per_step': seconds('overlapped'), 'seconds_per_step_apart': seconds('apart')}


def ranked(found: list[dict]) -> list[dict]:
  """By the time with nothing overlapped, which is nearer to what is reached."""
  return sorted(found, key=lambda f: (not f['fits'], f['seconds_per_step_apart'] or math.inf))


def table(result: dict) -> str:
  lines = [f'{"mesh":<44} remat   GiB a device, of             s a step: overlapped, apart']
  for f in result['suggestions']:
    times = ', '.join('?' if f[k] is None else f'{f[k]:.4g}' for k in ('seconds_per_step', 'seconds_per_step_apart'))
    peak = f'{f["peak_bytes"] / GIB:>8.2f}, {f["peak_of"]}'
    lines.append(f'{mesh_text(f["mesh"]):<44} {f["remat"]:<6}  {peak:<28} {times}'
                 + ('' if f['fits'] else '  DOES NOT FIT'))
  if result['meshes_left']:
    lines.append(f'{result["meshes_left"]} more meshes could fit and were not compiled: --tries and --minutes')
  return '\n'.join(lines)
