"""From compiled programs to a plan: does each fit, how long does it take at the least, and what does the run cost."""

import collections
import dataclasses
import math

import numpy as np

from moe_rl import config as configs
from moe_rl.planner import count, hlo
from moe_rl.planner.compile import Compilation, Compiled
from moe_rl.planner.cost import Network, Seconds
from moe_rl.planner.prices import CHIP_HOUR
from moe_rl.planner.topologies import Topology
from moe_rl.rl.objectives import chosen
from moe_rl.runtime import costs


@dataclasses.dataclass(frozen=True)
class Load:
  """How a program is used. rounds: of its outermost loop whose length is data, None if it has none; a_step: times it
  runs
  in a step of the run; useful: model FLOPs of one run of it, by formula, on all devices; tokens: that it samples or
  trains on."""

  rounds: float | None
  a_step: float
  useful: float
  tokens: float


@dataclasses.dataclass(frozen=True)
class Row:
  """One program's plan. peak, capacity: bytes a device; seconds: None where there is no HLO; round: seconds of one
  round of the loop whose length is data (a decode step, a microbatch)."""

  compiled: Compiled
  load: Load
  capacity: float
  work: count.Work | None = None
  seconds: Seconds | None = None
  round: Seconds | None = None
  open_loops: tuple[str, ...] = ()

  @property
  def fits(self) -> bool:
    return not self.compiled.error and self.compiled.peak <= self.capacity

  def utilisation(self, topology: Topology) -> tuple[float, float]:
    """(overlapped, nothing overlapped): useful FLOPs over what the slice could do in the estimated time."""
    whole = topology.generation.peak * topology.chips
    times = (self.seconds.overlapped, self.seconds.apart) if self.seconds else (0, 0)
    return tuple(self.load.useful / (whole * t) if t else 0.0 for t in times)


def loads(config, mean_tokens: float | None) -> tuple[dict[str, Load], list[str]]:
  """How each program is used, by name, and the assumptions in words. config: with its lengths."""
  model = configs.model_config(config)
  if config.stage == 'pretrain':
    c = config.pretrain
    tokens = c.rows_per_step * c.row_tokens
    useful = 3 * costs.forward_flops(model, tokens, c.row_tokens / 2)
    if model.mtp_layers:  # one more layer, a projection of two widths, the head again
      layer = dataclasses.replace(model, layers=1, dense_layers=0, mtp_layers=0)
      useful += 3 * (costs.forward_flops(layer, tokens, c.row_tokens / 2) + 4 * tokens * model.width**2)
    return {'pretrain update': Load(None, 1, useful, tokens)}, ['every row is one full document']
  return _rl_loads(config, dataclasses.replace(model, mtp_layers=0), mean_tokens)


def _rl_loads(config, model, mean_tokens: float | None) -> tuple[dict[str, Load], list[str]]:
  r, s, e = config.rl, config.sampling, config.eval
  mean = float(mean_tokens or s.max_new_tokens)
  configs.refuse(not 1 <= mean <= s.max_new_tokens,
                 f'--mean-tokens={mean:g}: must be 1 to config.sampling.max_new_tokens ({s.max_new_tokens})')
  whole, evaluated = r.prompts_per_step, configs.eval_prompts_per_batch(config)
  updates, most = r.minibatches * r.epochs, r.prompts_per_step // r.minibatches * r.group_size
  microbatches = min(math.ceil(most * (s.max_prompt_tokens + mean) / (r.row_tokens * r.microbatch_rows)),
                     -(-most // r.microbatch_rows))

  def parts(prompts, group):
    return costs.grpo_flops(model, np.full(prompts, s.max_prompt_tokens), np.full((prompts, group), mean),
                            chosen(r).kl_weight > 0)
  evaluations = math.ceil(e.problems / evaluated) / e.every if e.every else 0.0
  flops = parts(whole, r.group_size)
  assumed = [
    f'prompts of {s.max_prompt_tokens:,} tokens, responses of {mean:,.0f}'
    + ('' if mean_tokens else ' (the longest allowed: --mean-tokens changes it)'),
    f'all rows end together; {microbatches} microbatches an update, as if rows were packed full',
    'grading, data and checkpoints take no device time']
  return {
    'rollout': Load(max(mean - 1, 1), 1, flops['rollout'], whole * r.group_size * mean),
    'evaluation': Load(max(mean - 1, 1), evaluations, parts(evaluated, e.samples)['rollout'],
                       evaluated * e.samples * mean),
    'GRPO update': Load(microbatches, updates, flops['update'] / r.minibatches, most * mean),
  }, assumed


def rows(compilation: Compilation, topology: Topology, used: dict[str, Load]) -> list[Row]:
  network, out = Network(topology, compilation.places), []
  for c in compilation.programs:
    load = used.get(c.name, Load(None, 0, 0.0, 0.0))
    row = Row(c, load, topology.generation.hbm_device)
    if c.hlo:
      work = count.count(hlo.parse(c.hlo))
      open_loops = work.open_loops()
      total = work.total(load.rounds)
      longest = max(open_loops, key=lambda x: count.dearness(x.body), default=None)
      row = dataclasses.replace(
        row, work=total, seconds=network.seconds(total),
        open_loops=tuple(f'{x.source} ({x.trips.certain})' for x in open_loops),
        round=network.seconds(longest.body.total()) if longest else None)
    out.append(row)
  return out


def run(rows_: list[Row], topology: Topology, config, price: float | None) -> dict:
  """The run in numbers: seconds a step (overlapped, and with nothing overlapped), tokens, chip-hours and $.

  Empty where a program that a step needs has no estimate.
  """
  needed = [r for r in rows_ if r.load.a_step]
  if not needed or any(r.seconds is None for r in needed):
    return {}
  price = CHIP_HOUR[topology.generation.name] if price is None else price
  steps = config.pretrain.steps if config.stage == 'pretrain' else config.rl.steps
  out = {'chips': topology.chips, 'price_chip_hour': price, 'steps': steps}
  for name, of in (('overlapped', lambda s: s.overlapped), ('apart', lambda s: s.apart)):
    seconds = sum(r.load.a_step * of(r.seconds) for r in needed)
    main = next((r for r in needed if r.compiled.name == 'rollout'), needed[0])
    hours = seconds * steps * topology.chips / 3600
    out[name] = {'seconds_per_step': seconds, 'tokens_per_second_per_chip': main.load.tokens / seconds / topology.chips,
                 'chip_hours': hours, 'dollars': hours * price}
    if main.compiled.name == 'rollout':
      rate = main.load.tokens / of(main.seconds)
      out[name] |= {'sampled_tokens_per_second': rate,
                    'dollars_per_million_sampled_tokens': topology.chips * price / 3600 / rate * 1e6}
  return out


def by_kind(work: count.Work) -> dict[str, dict]:
  """Collectives by kind: how many, bytes that a device receives, bytes of their results."""
  out = collections.defaultdict(lambda: {'count': 0.0, 'received': 0.0, 'results': 0.0})
  for c, n in work.collectives.items():
    kind = out[c.kind]
    kind['count'] += n
    kind['received'] += n * c.received
    kind['results'] += n * c.result
  return dict(out)
