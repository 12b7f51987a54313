"""What work is worth: useful FLOPs by formula (no padding, no recomputation, no idle experts)."""

import numpy as np

from moe_rl.models.config import ModelConfig


def forward_flops(model: ModelConfig, tokens: float, context: float, head_tokens: float | None = None) -> float:
  """FLOPs (a multiply-add is 2) of one forward pass over `tokens` that see `context` tokens each on average.

  head_tokens: how many of them go through the unembedding (all, if None). Norms, softmax and the router's sort are left
  out; they are under 2% of a layer at width 128 and less above.
  """
  c = model
  projections, per_cell = (_latent if c.attention == 'mla' else _grouped)(c)
  attention = projections + context * per_cell
  dense = 3 * c.width * c.dense_ff
  moe = c.width * c.experts + 3 * c.width * c.expert_ff * (c.top_k + c.shared_experts)
  layers = c.layers * attention + c.dense_layers * dense + c.moe_layers * moe
  head = c.width * c.vocab_size * (tokens if head_tokens is None else head_tokens)
  return 2.0 * (tokens * layers + head)


def _latent(c: ModelConfig) -> tuple[int, int]:
  """Multiply-adds a token of MLA's naive form: (projections, a token that is seen)."""
  query = c.width * c.q_lora + c.q_lora * c.heads * c.qk_dim if c.q_lora else c.width * c.heads * c.qk_dim
  keys_values = c.width * c.latent_dim + c.kv_lora * c.heads * (c.nope_dim + c.v_dim)
  return query + keys_values + c.heads * c.v_dim * c.width, c.heads * (c.qk_dim + c.v_dim)


def _grouped(c: ModelConfig) -> tuple[int, int]:
  """The same of GQA: query and output, keys and values."""
  queries = c.heads * c.head_dim
  return c.width * (2 * queries + c.latent_dim), 2 * queries


def sampling_flops(model: ModelConfig, prompt_length_B, length_BxG) -> float:
  """Useful FLOPs of sampling: a prompt's prefill once a group, then every new token."""
  prompt, length = np.asarray(prompt_length_B, np.float64), np.asarray(length_BxG, np.float64)
  prefill = forward_flops(model, prompt.sum(), (prompt**2).sum() / 2 / prompt.sum(), head_tokens=prompt.size)
  context = (length * (prompt[:, None] + length / 2)).sum() / length.sum()
  return prefill + forward_flops(model, length.sum(), context)


def scoring_flops(model: ModelConfig, prompt_length_B, length_BxG) -> float:
  """Useful FLOPs of one forward pass over every sample with its prompt."""
  length = np.asarray(length_BxG, np.float64)
  whole = np.asarray(prompt_length_B, np.float64)[:, None] + length
  return forward_flops(model, whole.sum(), (whole**2).sum() / 2 / whole.sum(), head_tokens=length.sum())


def update_forwards(reference: bool) -> int:
  """Forward passes that an update is worth: forward and backward are three, the reference is one more."""
  return 4 if reference else 3


def grpo_flops(model: ModelConfig, prompt_length_B, length_BxG, reference: bool) -> dict[str, float]:
  """Useful FLOPs of one GRPO step by part: 'rollout' (`sampling_flops`) and 'update' (`update_forwards` times
  `scoring_flops`)."""
  return {'rollout': sampling_flops(model, prompt_length_B, length_BxG),
          'update': scoring_flops(model, prompt_length_B, length_BxG) * update_forwards(reference)}


class Costs:
  """What a run has spent, by part ('rollout', 'scoring', 'update', …): useful FLOPs, device-seconds, tokens and $.

  devices: how many the parts run on; device_hour: $ of one for an hour, 0 where it costs nothing or is not known;
  kept: the `record` of an earlier call that this run goes on from.
  """

  def __init__(self, devices: int, device_hour: float, kept: dict | None = None):
    self.devices, self.device_hour = devices, device_hour
    self.parts = {name: dict(part) for name, part in (kept or {}).items() if name != 'total'}

  def add(self, name: str, flops: float = 0.0, seconds: float = 0.0, tokens: int = 0):
    """seconds: wall time of the part, in which all devices count as busy."""
    part = self.parts.setdefault(name, {'flops': 0.0, 'device_seconds': 0.0, 'tokens': 0})
    part['flops'] += float(flops)
    part['device_seconds'] += seconds * self.devices
    part['tokens'] += int(tokens)

  def record(self) -> dict:
    """{part: {'flops', 'device_seconds', 'tokens', 'dollars'}} and their 'total'."""
    total = {k: sum(part[k] for part in self.parts.values()) for k in ('flops', 'device_seconds', 'tokens')}
    return {name: {k: part[k] for k in total} | {'dollars': part['device_seconds'] / 3600 * self.device_hour}
            for name, part in (*self.parts.items(), ('total', total))}

  def scalars(self) -> tuple[dict, dict]:
    """For TensorBoard: what equal runs share (FLOPs, tokens), and what they do not (time, money)."""
    total = self.record()['total']
    return ({f'cost/{k}': total[k] for k in ('flops', 'tokens')},
            {f'cost/{k}': total[k] for k in ('device_seconds', 'dollars')})
