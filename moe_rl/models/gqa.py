"""Grouped-query attention (Ainslie et al., arXiv:2305.13245): `heads` queries read `kv_heads` keys and values.

Qwen2 has biases on queries, keys and values, Qwen3 normalises each head's query and key before they turn, Llama has
neither. Methods and cells are those of latent attention, so that trainer, sampler and cache serve both: a cell is every
key head, turned, beside every value head, Z = 2 kv_heads head_dim numbers a token.

Further axes by letter: J key and value heads, M = H / J queries of one key head, d width of a head.
"""

import flax.linen as nn
import jax.numpy as jnp

from moe_rl.models.attend import attend
from moe_rl.models.attention import decode_weights
from moe_rl.models.config import ModelConfig
from moe_rl.models.layers import RMSNorm, place, product, weight
from moe_rl.models.rope import rotate
from moe_rl.runtime.mesh import Layout


class GQA(nn.Module):
  """Query head h reads key and value head h // M."""

  config: ModelConfig
  layout: Layout | None = None

  def setup(self):
    c = self.config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    self.q = weight(self, 'q', (c.width, queries), ('embed', 'heads'))
    self.k = weight(self, 'k', (c.width, keys), ('embed', 'heads'))
    self.v = weight(self, 'v', (c.width, keys), ('embed', 'heads'))
    self.out = weight(self, 'out', (queries, c.width), ('heads', 'embed'))
    if c.qkv_bias:
      zeros = nn.initializers.zeros
      self.q_bias = weight(self, 'q_bias', (queries,), ('heads',), zeros)
      self.k_bias = weight(self, 'k_bias', (keys,), ('heads',), zeros)
      self.v_bias = weight(self, 'v_bias', (keys,), ('heads',), zeros)
    if c.qk_norm:
      self.q_norm = RMSNorm(c.norm_eps, c.param_dtype)
      self.k_norm = RMSNorm(c.norm_eps, c.param_dtype)

  def queries(self, x, positions):
    """[..., D] -> [..., H, d], turned."""
    c = self.config
    q = product(self, x, self.q) + self.q_bias if c.qkv_bias else product(self, x, self.q)
    q = place(self, q.reshape(*x.shape[:-1], c.heads, c.head_dim), 'batch', None, 'head_work', None)
    return rotate(self.q_norm(q) if c.qk_norm else q, positions, c)

  def cells(self, x, positions):
    """[..., D] -> [..., Z]: turned keys beside values, as the cache holds them."""
    c = self.config
    k, v = product(self, x, self.k), product(self, x, self.v)
    if c.qkv_bias:
      k, v = k + self.k_bias, v + self.v_bias
    k = k.reshape(*x.shape[:-1], c.kv_heads, c.head_dim)
    k = rotate(self.k_norm(k) if c.qk_norm else k, positions, c)
    return jnp.concatenate([k.reshape(v.shape), v], axis=-1)

  def keys_values(self, cells):
    """[..., Z] -> keys and values [..., J, d]."""
    c = self.config
    both = cells.reshape(*cells.shape[:-1], 2, c.kv_heads, c.head_dim)
    return both[..., 0, :, :], both[..., 1, :, :]

  def __call__(self, x_NxTxD, positions_NxT, segments_NxT):
    """Causal attention within segments.

    segments_NxT: int32, 0 is padding; a token sees earlier tokens of its own segment, so packing isolates samples.
    Returns output [N, T, D] and cells [N, T, Z].
    """
    c = self.config
    query = self.queries(x_NxTxD, positions_NxT) * c.softmax_scale
    cells_NxTxZ = self.cells(x_NxTxD, positions_NxT)
    key, value = (place(self, jnp.repeat(a, c.heads // c.kv_heads, axis=2), 'batch', None, 'head_work', None)
                  for a in self.keys_values(cells_NxTxZ))
    o_NxTxHxd = attend(query, key, value, segments_NxT, self.layout)
    return product(self, o_NxTxHxd.reshape(*x_NxTxD.shape[:2], -1), self.out), cells_NxTxZ

  def decode(self, x_BxGxD, positions_BxG, prompt_BxPxZ, own_BxGxSxZ, prompt_length_B, own_length):
    """Attention of one new token a completion; reads the cache, returns the cell to be written.

    Cells p < prompt_length_B and s < own_length are visible, and the new token itself. Softmax over the three
    parts together. Returns output [B, G, D] and cells [B, G, Z].
    """
    c = self.config
    q_BxGxJxMxd = self.queries(x_BxGxD, positions_BxG).reshape(*x_BxGxD.shape[:2], c.kv_heads, -1, c.head_dim)
    q_BxGxJxMxd = place(self, q_BxGxJxMxd, 'batch', 'places', None, None, None)  # as the cache lies
    cell_BxGxZ = self.cells(x_BxGxD, positions_BxG)
    keys, values = zip(*map(self.keys_values, (prompt_BxPxZ, own_BxGxSxZ, cell_BxGxZ[:, :, None])), strict=True)
    axes = ('bpjd', 'bgpjd', 'bgpjd')  # a group shares its prompt's cells

    scores = (
      jnp.einsum(f'{a},bgjmd->bgjmp', key, q_BxGxJxMxd, preferred_element_type=jnp.float32) * c.softmax_scale
      for a, key in zip(axes, keys, strict=True))
    parts = decode_weights(*scores, prompt_length_B, own_length, x_BxGxD.dtype)
    o_BxGxJxMxd = sum(jnp.einsum(f'bgjmp,{a}->bgjmd', p, value)
                      for a, p, value in zip(axes, parts, values, strict=True))
    return product(self, o_BxGxJxMxd.reshape(*x_BxGxD.shape[:2], -1), self.out), cell_BxGxZ
