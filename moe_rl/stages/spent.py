"""What a stage has cost, at the config's price or the table's."""

import jax

from moe_rl.models.config import ModelConfig
from moe_rl.planner.prices import device_hour
from moe_rl.runtime.costs import Costs, forward_flops, sampling_flops


def costs_of(config, kept: dict | None = None) -> Costs:
  """Costs of all devices there are; kept: the record of an earlier call that this one goes on from."""
  return Costs(jax.device_count(), device_hour(config.device_hour, jax.devices()[0].device_kind), kept)


def training_flops(model: ModelConfig, tokens: float, context: float) -> float:
  """Useful FLOPs of training on so many tokens that see `context` tokens each: forward and backward, three forwards.
  A prediction module is left out, and so is a reward model's head, which has one row."""
  return 3 * forward_flops(model, tokens, context, head_tokens=0 if model.head == 'scalar' else None)


def sampling_costs(config, stage, prompts: list, answers: list[dict], seconds: float) -> dict:
  """The `Costs.record` of a stage that only samples. FLOPs and tokens are of all answers; seconds: of this call, in
  which those that were there already took none."""
  costs, samples = costs_of(config), stage.settings['group']
  lengths = [[a['tokens'] for a in answers[i:i + samples]] for i in range(0, len(answers), samples)]
  if lengths:
    flops = sampling_flops(stage.model, [len(p.ids) for p in prompts[:len(lengths)]], lengths)
    costs.add('sampling', flops, seconds, sum(map(sum, lengths)))
  return costs.record()
