"""Names of the hub's tensors and their places in ours, one to one: deepseek_v3, deepseek_v2, qwen2, qwen3, llama.

The hub has one tensor a layer and an expert, matrices as [out, in]; we stack layers and experts on leading axes and
have [in, out]. DeepSeek's rotated rows come as interleaved pairs (2i, 2i + 1), ours are half-split (i, i + R/2): the
rows of queries and of the shared key are reordered, which changes no score (see rope.rotate).
"""

import dataclasses
import functools

import numpy as np

from moe_rl.models.config import ModelConfig
from moe_rl.models.fp8 import scale_shape

SCALE = '_scale_inv'  # of a block-quantised weight, appended to its name


@dataclasses.dataclass(frozen=True)
class Slot:
  """Where a tensor of the hub's lives in ours.

  path: of our array, 'params/…' or 'router/…'; index: into its leading axes (layer, expert); shape: as on the hub;
  transpose: ours is [in, out]; rotated: (r, t) if in every t rows the last r are interleaved pairs, None otherwise;
  scaled: a matrix that may be FP8, with scales of its own; copy: the name that it repeats, '' if it stands for itself;
  scale_of: the name whose scales it holds, '' for a weight.
  """

  path: str
  index: tuple[int, ...]
  shape: tuple[int, ...]
  transpose: bool = False
  rotated: tuple[int, int] | None = None
  scaled: bool = False
  copy: str = ''
  scale_of: str = ''

  @property
  def order(self) -> np.ndarray | None:
    """int [rows]: which of the hub's rows each of ours is; None where the order is the same."""
    return None if self.rotated is None else _half_split(self.shape[0], *self.rotated)


@functools.cache
def _half_split(rows: int, rotated: int, period: int) -> np.ndarray:
  head = np.arange(period)
  head[period - rotated:] = period - rotated + np.arange(rotated).reshape(-1, 2).T.reshape(-1)
  return (np.arange(0, rows, period)[:, None] + head).reshape(-1)


def names(config: ModelConfig, fp8: bool = False) -> dict[str, Slot]:
  """Every tensor of the family's checkpoint by name, in the hub's order; `fp8` adds the scales.

  The MTP layer's copies of embedding and head are in it, marked as copies. Without them each number of ours is in
  exactly one slot.
  """
  c, out = config, {'model.embed_tokens.weight': Slot('params/embed', (), (config.vocab_size, config.width))}
  for layer in range(c.layers):
    moe = layer >= c.dense_layers
    place = ('moe', layer - c.dense_layers) if moe else ('dense', layer)
    out |= _block(c, f'model.layers.{layer}', place[0], (place[1],), moe)
  if c.mtp_layers:
    out |= _prediction(c, f'model.layers.{c.layers}')
  out['model.norm.weight'] = Slot('params/final_norm/scale', (), (c.width,))
  if not c.tied:
    out['lm_head.weight'] = Slot('params/unembed', (), (c.vocab_size, c.width), transpose=True)
  return with_scales(out, [name for name, slot in out.items() if slot.scaled]) if fp8 else out


def with_scales(slots: dict[str, Slot], quantised) -> dict[str, Slot]:
  """The table with scales after each of the `quantised` names."""
  quantised, out = set(quantised), {}
  for name, slot in slots.items():
    out[name] = slot
    if name in quantised:
      out[name + SCALE] = Slot(slot.path, slot.index, scale_shape(slot.shape), scale_of=name)
  return out


def repeats(config: ModelConfig) -> dict[str, Slot]:
  """Tensors that a checkpoint may hold beside `names`, as they repeat another: a tied model's output matrix."""
  return {} if not config.tied else {'lm_head.weight': Slot(
    'params/embed', (), (config.vocab_size, config.width), copy='model.embed_tokens.weight')}


def _block(c: ModelConfig, name: str, path: str, index: tuple[int, ...], moe: bool) -> dict[str, Slot]:
  ours = f'params/{path}'
  out = {f'{name}.self_attn.{k}': v for k, v in _attention(c, f'{ours}/attention', index).items()}
  if moe:
    out |= {f'{name}.mlp.{k}': v for k, v in _experts(c, path, index).items()}
  else:
    out |= {f'{name}.mlp.{k}': v for k, v in _swiglu(f'{ours}/ff', index, c.width, c.dense_ff).items()}
  out[f'{name}.input_layernorm.weight'] = Slot(f'{ours}/attention_norm/scale', index, (c.width,))
  out[f'{name}.post_attention_layernorm.weight'] = Slot(f'{ours}/ff_norm/scale', index, (c.width,))
  return out


def _matrix(path: str, index: tuple[int, ...], rows: int, columns: int, rotated=None) -> Slot:
  return Slot(path, index, (rows, columns), transpose=True, rotated=rotated, scaled=True)


def _attention(c: ModelConfig, ours: str, index: tuple[int, ...]) -> dict[str, Slot]:
  return (_latent if c.attention == 'mla' else _grouped)(c, ours, index)


def _latent(c: ModelConfig, ours: str, index: tuple[int, ...]) -> dict[str, Slot]:
  by_head, shared = (c.rope_dim, c.qk_dim), (c.rope_dim, c.latent_dim)
  if c.q_lora:
    out = {'q_a_proj.weight': _matrix(f'{ours}/q_down', index, c.q_lora, c.width),
           'q_a_layernorm.weight': Slot(f'{ours}/q_norm/scale', index, (c.q_lora,)),
           'q_b_proj.weight': _matrix(f'{ours}/q_up', index, c.heads * c.qk_dim, c.q_lora, by_head)}
  else:
    out = {'q_proj.weight': _matrix(f'{ours}/q', index, c.heads * c.qk_dim, c.width, by_head)}
  return out | {
    'kv_a_proj_with_mqa.weight': _matrix(f'{ours}/kv_down', index, c.latent_dim, c.width, shared),
    'kv_a_layernorm.weight': Slot(f'{ours}/kv_norm/scale', index, (c.kv_lora,)),
    'kv_b_proj.weight': _matrix(f'{ours}/kv_up', index, c.heads * (c.nope_dim + c.v_dim), c.kv_lora),
    'o_proj.weight': _matrix(f'{ours}/out', index, c.width, c.heads * c.v_dim)}


def _grouped(c: ModelConfig, ours: str, index: tuple[int, ...]) -> dict[str, Slot]:
  out, rows = {}, {'q': c.heads * c.head_dim, 'k': c.kv_heads * c.head_dim, 'v': c.kv_heads * c.head_dim}
  for part, count in rows.items():
    out[f'{part}_proj.weight'] = _matrix(f'{ours}/{part}', index, count, c.width)
    if c.qkv_bias:
      out[f'{part}_proj.bias'] = Slot(f'{ours}/{part}_bias', index, (count,))
  out['o_proj.weight'] = _matrix(f'{ours}/out', index, c.width, rows['q'])
  if c.qk_norm:
    out |= {f'{part}_norm.weight': Slot(f'{ours}/{part}_norm/scale', index, (c.head_dim,)) for part in 'qk'}
  return out


def _swiglu(ours: str, index: tuple[int, ...], width: int, ff: int) -> dict[str, Slot]:
  return {'gate_proj.weight': _matrix(f'{ours}/gate', index, ff, width),
          'up_proj.weight': _matrix(f'{ours}/up', index, ff, width),
          'down_proj.weight': _matrix(f'{ours}/down', index, width, ff)}


def _experts(c: ModelConfig, path: str, index: tuple[int, ...]) -> dict[str, Slot]:
  ours = f'params/{path}/ff'
  out = {'gate.weight': Slot(f'{ours}/router', index, (c.experts, c.width), transpose=True)}
  if c.score == 'sigmoid':
    out['gate.e_score_correction_bias'] = Slot(f'router/{path}/ff/bias', index, (c.experts,))
  for e in range(c.experts):
    out |= {f'experts.{e}.{k}': v for k, v in _swiglu(ours, (*index, e), c.width, c.expert_ff).items()}
  if c.shared_experts:
    shared = _swiglu(f'{ours}/shared', index, c.width, c.shared_experts * c.expert_ff)
    out |= {f'shared_experts.{k}': v for k, v in shared.items()}
  return out


def _prediction(c: ModelConfig, name: str) -> dict[str, Slot]:
  """The multi-token prediction layer, stored as one layer more; eh_proj takes [embedding; hidden], as ours does."""
  vocabulary = (c.vocab_size, c.width)
  head = {'copy': 'model.embed_tokens.weight'} if c.tied else {'copy': 'lm_head.weight', 'transpose': True}
  norms = {'enorm': 'embed_norm', 'hnorm': 'hidden_norm', 'shared_head.norm': 'final_norm'}
  return {
    f'{name}.embed_tokens.weight': Slot('params/embed', (), vocabulary, copy='model.embed_tokens.weight'),
    **{f'{name}.{hub}.weight': Slot(f'params/mtp/{own}/scale', (), (c.width,)) for hub, own in norms.items()},
    f'{name}.eh_proj.weight': Slot('params/mtp/project', (), (c.width, 2 * c.width), transpose=True),
    **_block(c, name, 'mtp/block', (), moe=True),
    f'{name}.shared_head.head.weight': Slot(
      'params/embed' if c.tied else 'params/unembed', (), vocabulary, **head)}
