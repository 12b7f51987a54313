"""Multi-head latent attention (MLA): one set of weights, a naive form and an absorbed form.

DeepSeek-V2 (arXiv:2405.04434) sec. 2.1, DeepSeek-V3 (arXiv:2412.19437) eq. 1 to 11. The naive form expands keys
and values for a whole sequence (training, scoring, prefill). The absorbed form attends in latent space (decode): it is
multi-query attention with keys of width C + R and values of width C, so a cached token costs C + R numbers a layer.
"""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_rl.models.attend import MASKED, attend
from moe_rl.models.config import ModelConfig
from moe_rl.models.layers import RMSNorm, place, product, weight
from moe_rl.models.rope import rotate
from moe_rl.runtime.mesh import Layout

LATENT_NORM_EPS = 1e-6  # both latent norms, whatever norm_eps says: the released models were run like that


@flax.struct.dataclass
class LatentCache:
  """What decode reads: a cell a token, as the model's attention makes and reads it, layers leading.

  A group's completions share their prompt's cells, which are stored once. The layers are an axis or, after `split`, a
  tuple. An axis is scanned over, which compiles one layer; a tuple is decoded layer by layer, which spares CPU the
  copies of each layer's part that a scan makes.

  prompt_LxBxPxZ: cells of the prompts, in the compute dtype; own_LxBxGxSxZ: cells of each completion;
  prompt_length_B: int32, cells of the prompt that hold a token; own_length: int32 scalar, cells written.
  """

  prompt_LxBxPxZ: jax.Array | tuple[jax.Array, ...]
  own_LxBxGxSxZ: jax.Array | tuple[jax.Array, ...]
  prompt_length_B: jax.Array
  own_length: jax.Array

  def split(self) -> 'LatentCache':
    """The same with a tuple over layers."""
    return self.replace(prompt_LxBxPxZ=tuple(self.prompt_LxBxPxZ), own_LxBxGxSxZ=tuple(self.own_LxBxGxSxZ))

  def with_room(self, cells: int) -> 'LatentCache':
    """The same, a tuple over layers, with so many own cells, no fewer than there are."""
    def longer(own_BxGxSxZ):
      return jnp.pad(own_BxGxSxZ, ((0, 0), (0, 0), (0, cells - own_BxGxSxZ.shape[2]), (0, 0)))
    return self.replace(own_LxBxGxSxZ=tuple(map(longer, self.own_LxBxGxSxZ)))


def decode_weights(scores, prompt_length_B, own_length, dtype) -> list[jax.Array]:
  """Softmax over all parts of a cache together, as arrays of `dtype` of the parts' shapes.

  scores: float32 [B, G, ..., cells] of prompt cells, of own cells and, where it is a part, of the new one; visible are
  cells p < prompt_length_B, s < own_length and the new.
  """
  prompt, own, *new = scores
  length = prompt_length_B.reshape(-1, *[1] * (prompt.ndim - 1))
  prompt = jnp.where(jnp.arange(prompt.shape[-1]) < length, prompt, MASKED)
  own = jnp.where(jnp.arange(own.shape[-1]) < own_length, own, MASKED)
  p = jax.nn.softmax(jnp.concatenate([prompt, own, *new], axis=-1), axis=-1).astype(dtype)
  at = prompt.shape[-1]
  return jnp.split(p, [at, at + own.shape[-1]] if new else [at], axis=-1)


class MLA(nn.Module):
  """Latent attention over x; see the module's text for the two forms."""

  config: ModelConfig
  layout: Layout | None = None

  def setup(self):
    c = self.config
    qk = c.heads * c.qk_dim
    if c.q_lora:
      self.q_down = weight(self, 'q_down', (c.width, c.q_lora), ('embed', 'q_lora'))
      self.q_norm = RMSNorm(LATENT_NORM_EPS, c.param_dtype)
      self.q_up = weight(self, 'q_up', (c.q_lora, qk), ('q_lora', 'heads'))
    else:
      self.q = weight(self, 'q', (c.width, qk), ('embed', 'heads'))
    self.kv_down = weight(self, 'kv_down', (c.width, c.latent_dim), ('embed', 'latent'))
    self.kv_norm = RMSNorm(LATENT_NORM_EPS, c.param_dtype)
    self.kv_up = weight(self, 'kv_up', (c.kv_lora, c.heads * (c.nope_dim + c.v_dim)), ('latent', 'heads'))
    self.out = weight(self, 'out', (c.heads * c.v_dim, c.width), ('heads', 'embed'))

  def queries(self, x, positions):
    """[..., D] -> content [..., H, nope] and rotated [..., H, R] parts."""
    c = self.config
    q = product(self, self.q_norm(product(self, x, self.q_down)), self.q_up) if c.q_lora else product(self, x, self.q)
    q = place(self, q.reshape(*x.shape[:-1], c.heads, c.qk_dim), 'batch', None, 'head_work', None)
    return q[..., :c.nope_dim], rotate(q[..., c.nope_dim:], positions, c)

  def cells(self, x, positions):
    """[..., D] -> [..., Z]: the normed latent beside the rotated shared key, as the cache holds them."""
    c = self.config
    down = product(self, x, self.kv_down)
    latent, key = self.kv_norm(down[..., :c.kv_lora]), rotate(down[..., c.kv_lora:], positions, c)
    return jnp.concatenate([latent, key], axis=-1)

  def expansion(self):
    """W_UK [C, H, nope] and W_UV [C, H, v], views of the one stored matrix."""
    c = self.config
    up = self.kv_up.reshape(c.kv_lora, c.heads, c.nope_dim + c.v_dim)
    return up[..., :c.nope_dim], up[..., c.nope_dim:]

  def __call__(self, x_NxTxD, positions_NxT, segments_NxT):
    """Naive causal attention within segments.

    segments_NxT: int32, 0 is padding; a token sees earlier tokens of its own segment, so packing isolates samples.
    Returns output [N, T, D] and cells [N, T, Z].
    """
    c = self.config
    q_nope, q_rope = self.queries(x_NxTxD, positions_NxT)
    cells_NxTxZ = self.cells(x_NxTxD, positions_NxT)
    latent, k_rope = cells_NxTxZ[..., :c.kv_lora], cells_NxTxZ[..., c.kv_lora:]
    up = product(self, latent, self.kv_up).reshape(*latent.shape[:2], c.heads, c.nope_dim + c.v_dim)
    up = place(self, up, 'batch', None, 'head_work', None)
    k_nope, value = up[..., :c.nope_dim], up[..., c.nope_dim:]
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], c.rope_dim))
    query = jnp.concatenate([q_nope, q_rope], axis=-1) * c.softmax_scale
    key = jnp.concatenate([k_nope, k_rope], axis=-1)
    o_NxTxHxV = attend(query, key, value, segments_NxT, self.layout)
    return product(self, o_NxTxHxV.reshape(*x_NxTxD.shape[:2], -1), self.out), cells_NxTxZ

  def decode(self, x_BxGxD, positions_BxG, prompt_BxPxZ, own_BxGxSxZ, prompt_length_B, own_length, cell_BxGxZ=None):
    """Absorbed attention of one new token a completion; reads the cache. Returns [B, G, D].

    Cells p < prompt_length_B and s < own_length are visible, and the new token's own cell: cell_BxGxZ (`cells` makes
    it) or, where that is None, the last of the visible own ones.
    """
    c = self.config
    up_k, up_v = self.expansion()
    q_nope, q_rope = self.queries(x_BxGxD, positions_BxG)
    q_BxGxHxZ = jnp.concatenate([jnp.einsum('bghd,chd->bghc', q_nope, up_k), q_rope], axis=-1)
    q_BxGxHxZ = place(self, q_BxGxHxZ, 'batch', 'places', None, None)  # the cache lies by completion, weights by head

    def scores(equation, cells):
      return jnp.einsum(equation, cells, q_BxGxHxZ, preferred_element_type=jnp.float32) * c.softmax_scale
    # Cells lead: a product that transposes the few queries, and not the cache, is several times faster on CPU.
    parts = [scores('bpz,bghz->bpgh', prompt_BxPxZ).transpose(0, 2, 3, 1),
             scores('bgsz,bghz->bgsh', own_BxGxSxZ).swapaxes(2, 3)]
    if cell_BxGxZ is not None:
      parts.append(scores('bgz,bghz->bgh', cell_BxGxZ)[..., None])
    p_prompt, p_own, *p_new = decode_weights(parts, prompt_length_B, own_length, x_BxGxD.dtype)
    # The rotated keys' columns come along and are cut off: cheaper than a cut copy of the cache.
    o_BxGxHxZ = jnp.einsum('bghp,bpz->bghz', p_prompt, prompt_BxPxZ) + jnp.einsum('bghs,bgsz->bghz', p_own, own_BxGxSxZ)
    if p_new:
      o_BxGxHxZ += p_new[0] * cell_BxGxZ[:, :, None]
    o_BxGxHxC = place(self, o_BxGxHxZ[..., :c.kv_lora], 'batch', None, 'head_work', None)
    o = jnp.einsum('bghc,chd->bghd', o_BxGxHxC, up_v)
    return product(self, o.reshape(*x_BxGxD.shape[:2], -1), self.out)
