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


def grpo_flops(model: ModelConfig, prompt_length_B, length_BxG, reference: bool) -> dict[str, float]:
  """Useful FLOPs of one GRPO step by part: 'rollout' (a prompt's prefill once a group, then every new token) and
  'update' (forward and backward, 3 forwards, of every sample with its prompt; one more for the reference)."""
  prompt, length = np.asarray(prompt_length_B, np.float64), np.asarray(length_BxG, np.float64)
  whole = prompt[:, None] + length
  rollout = forward_flops(model, prompt.sum(), (prompt**2).sum() / 2 / prompt.sum(), head_tokens=prompt.size)
  rollout += forward_flops(model, length.sum(), (length * (prompt[:, None] + length / 2)).sum() / length.sum())
  forward = forward_flops(model, whole.sum(), (whole**2).sum() / 2 / whole.sum(), head_tokens=length.sum())
  return {'rollout': rollout, 'update': forward * (4 if reference else 3)}
