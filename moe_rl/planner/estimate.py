"""From compiled programs to a plan: does each fit, how long does it take at the least, and what does the run cost."""

import collections
import dataclasses
import math

import numpy as np

from moe_rl import config as configs
from moe_rl.models.checkpoints import open_checkpoint
from moe_rl.models.expert_parallel import EVEN_PARTS
from moe_rl.planner import count, hlo
from moe_rl.planner.compile import Compilation, Compiled
from moe_rl.planner.cost import Network, Seconds
from moe_rl.planner.prices import CHIP_HOUR
from moe_rl.planner.topologies import Topology
from moe_rl.refusals import refuse
from moe_rl.rl.objectives import chosen
from moe_rl.runtime import costs
from moe_rl.runtime.programs import DECODING, EXCHANGES, MICROBATCHES, PARTS

R1_TRACE_TOKENS = 4.3e9  # 804,745 traces of 5,355 tokens (arXiv:2501.12948v2, supplement, table 5)
R1_PAIRS = 66_000  # helpfulness, arXiv:2501.12948v2, supplement


@dataclasses.dataclass(frozen=True)
class Load:
  """How a program is used. rounds: of its loops whose length is data, by name; a_step: times it runs in a step of the
  run; useful: model FLOPs of one run of it, by formula, on all devices; tokens: that it samples or trains on."""

  rounds: dict[str, float]
  a_step: float
  useful: float = 0.0
  tokens: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rounds:
  """Loops of one name. assumed: how often each goes round; certain: as `hlo.Trips`; count: how many there are, as they
  are written; source: of the first."""

  name: str
  assumed: float
  certain: str
  count: int
  source: str


@dataclasses.dataclass(frozen=True)
class Row:
  """One program's plan. capacity: bytes a device; seconds: None where there is no HLO; round: seconds of one round of
  the longest loop whose length is data (a decode step, a microbatch), and its name; loops: all of those."""

  compiled: Compiled
  load: Load
  capacity: float
  work: count.Work | None = None
  seconds: Seconds | None = None
  round: tuple[str, Seconds] | None = None
  loops: tuple[Rounds, ...] = ()

  @property
  def fits(self) -> bool:
    return not self.compiled.error and 0 < self.compiled.peak <= self.capacity  # nothing takes nothing

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
    return {'pretrain update': Load(rounds_of(model), 1, useful, tokens)}, [
      'every row is one full document', *balance(model)]
  model = dataclasses.replace(model, mtp_layers=0)
  if config.stage == 'reward_model':
    c = config.reward_model
    tokens = c.examples_per_step * c.row_tokens
    useful = 3 * costs.forward_flops(model, tokens, c.row_tokens / 4, head_tokens=0)
    return {'preference update': Load(rounds_of(model), 1, useful, tokens)}, [
      'every row is one full example (of a pair, both answers as long)',
      f"as many examples as DeepSeek-R1's pairs: {R1_PAIRS:,} an epoch", *balance(model)]
  return _sft_loads(config, model) if config.stage == 'sft' else _rl_loads(config, model, mean_tokens)


def _sft_loads(config, model) -> tuple[dict[str, Load], list[str]]:
  c = config.sft
  tokens = c.rows_per_step * c.row_tokens
  useful = 3 * costs.forward_flops(model, tokens, c.row_tokens / 2)
  if c.teacher:
    useful += costs.forward_flops(open_checkpoint(c.teacher).model, tokens, c.row_tokens / 2)
  return {'SFT update': Load(rounds_of(model), 1, useful, tokens)}, [
    'every row is one full example', f"as many traces as DeepSeek-R1's: {R1_TRACE_TOKENS / 1e9:g}B tokens an epoch",
    *balance(model)]


def steps_of(config) -> int:
  """Steps of a run; where the data give them, as of fine-tuning and reward models, those that R1's would give."""
  if config.stage == 'sft':
    c = config.sft
    return math.ceil(c.epochs * R1_TRACE_TOKENS / (c.rows_per_step * c.row_tokens))
  if config.stage == 'reward_model':
    return math.ceil(config.reward_model.epochs * R1_PAIRS / config.reward_model.examples_per_step)
  return config[config.stage].steps


def rounds_of(model, **others: float) -> dict[str, float]:
  """Rounds by name: those given, and of the exchange with experts what a balanced load takes."""
  return {**others, **({EXCHANGES: 1.0, PARTS: float(EVEN_PARTS)} if model.moe_layers else {})}


def balance(model) -> list[str]:
  return ['tokens are exchanged with experts in one round: a balanced load'] if model.moe_layers else []


def _rl_loads(config, model, mean_tokens: float | None) -> tuple[dict[str, Load], list[str]]:
  r, s, e = config.rl, config.sampling, config.eval
  mean = float(mean_tokens or s.max_new_tokens)
  refuse(not 1 <= mean <= s.max_new_tokens,
         f'--mean_tokens={mean:g}: must be 1 to config.sampling.max_new_tokens ({s.max_new_tokens})')
  reference = chosen(r).kl_weight > 0
  whole, evaluated = r.prompts_per_step, configs.eval_prompts_per_batch(config)
  updates, most = r.minibatches * r.epochs, r.prompts_per_step * r.group_size // r.minibatches
  microbatches = min(math.ceil(most * (s.max_prompt_tokens + mean) / (r.row_tokens * r.microbatch_rows)),
                     -(-most // r.microbatch_rows))

  def parts(prompts, group):
    return costs.grpo_flops(model, np.full(prompts, s.max_prompt_tokens), np.full((prompts, group), mean),
                            reference)
  evaluations = math.ceil(e.problems / evaluated) / e.every if e.every else 0.0
  flops = parts(whole, r.group_size)
  assumed = [
    f'prompts of {s.max_prompt_tokens:,} tokens, responses of {mean:,.0f}'
    + ('' if mean_tokens else ' (the longest allowed: --mean_tokens changes it)'),
    f'all rows end together; {microbatches} microbatches an update, as if rows were packed full',
    *balance(model), 'grading, data and checkpoints take no device time']
  sampling, training = (rounds_of(model, **{k: v}) for k, v in ((DECODING, max(mean - 1, 1)),
                                                                (MICROBATCHES, microbatches)))
  passes = 4 if reference else 3  # one is the forward pass, all that scoring does
  return {
    'weights to sampler': Load({}, 1 + evaluations),
    'rollout': Load(sampling, 1, flops['rollout'], whole * r.group_size * mean),
    'evaluation': Load(sampling, evaluations, parts(evaluated, e.samples)['rollout'], evaluated * e.samples * mean),
    'scoring': Load(training, r.minibatches, flops['update'] / r.minibatches / passes, most * mean),
    'GRPO update': Load(training, updates, flops['update'] / r.minibatches, most * mean),
  }, assumed


def rows(compilation: Compilation, topology: Topology, used: dict[str, Load]) -> list[Row]:
  network, out = Network(topology, compilation.places), []
  for c in compilation.programs:
    load = used.get(c.name, Load({}, 0))
    row = Row(c, load, topology.generation.hbm_device)
    if c.hlo:
      work = count.count(hlo.parse(c.hlo))
      total, loops = work.total(load.rounds), work.open_loops()
      longest = max(loops, key=lambda x: count.dearness(x.body, load.rounds), default=None)
      row = dataclasses.replace(
        row, work=total, seconds=network.seconds(total), loops=rounds_by_name(loops, load.rounds),
        round=(longest.name, network.seconds(longest.body.total(load.rounds))) if longest else None)
    out.append(row)
  return out


def rounds_by_name(loops: list[count.Loop], rounds: dict[str, float]) -> tuple[Rounds, ...]:
  """What was assumed of loops whose length is data, in their order; those of a program's own names first."""
  found = {}
  for x in loops:
    known = x.name in rounds
    at = found.setdefault(x.name if known else x.source, [])
    at.append(Rounds(x.name, rounds[x.name] if known else x.trips.count, x.trips.certain, 0, x.source))
  return tuple(dataclasses.replace(at[0], count=len(at)) for at in found.values())


def run(rows_: list[Row], topology: Topology, config, price: float | None) -> dict:
  """The run in numbers: seconds a step (overlapped, and with nothing overlapped), tokens, chip-hours and $.

  Empty where a program that a step needs has no estimate.
  """
  needed = [r for r in rows_ if r.load.a_step]
  if not needed or any(r.seconds is None for r in needed):
    return {}
  price = CHIP_HOUR[topology.generation.name] if price is None else price
  steps = steps_of(config)
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
