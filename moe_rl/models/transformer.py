"""The Transformer: one module for training, scoring, prefill and decode (DeepSeek-V3, arXiv:2412.19437, sec. 2).

Attention is latent or grouped, the feed-forward sparse or dense, the head its own or the embedding: as the config says.
"""

import dataclasses
import math

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_rl.models.attention import MLA, LatentCache
from moe_rl.models.config import ModelConfig
from moe_rl.models.gqa import GQA
from moe_rl.models.layers import RMSNorm, SwiGLU, place, weight
from moe_rl.models.moe import MoE, RouterStats
from moe_rl.runtime.mesh import Layout

FEW_LAYERS = 8  # of a model, for `one_by_one`
CELL_BLOCK = 128  # own cells that are written at once: a TPU's lanes, along which the compiler lays them
RESIDUAL = ('batch', 'places', None)  # logical axes of [N, T, D] between blocks
MIDDLE = 'between attention and feed-forward'  # what remat 'halves' keeps


@flax.struct.dataclass
class Output:
  """hidden_NxTxD: after the last layer, before the final norm; cells_LxNxTxZ: what a cache of the sequence holds
  (None unless asked for); router: stats with a leading axis over MoE layers (None without any)."""

  hidden_NxTxD: jax.Array
  cells_LxNxTxZ: jax.Array | None
  router: RouterStats | None


class Block(nn.Module):
  """Pre-norm attention and feed-forward, in the form that scan over layers takes: x in, (x, per-layer outputs) out."""

  config: ModelConfig
  moe: bool
  layout: Layout | None = None

  def setup(self):
    c = self.config
    self.attention_norm = RMSNorm(c.norm_eps, c.param_dtype)
    self.attention = {'mla': MLA, 'gqa': GQA}[c.attention](c, self.layout)
    self.ff_norm = RMSNorm(c.norm_eps, c.param_dtype)
    routed = dataclasses.replace(self.layout, routing=(c.groups, c.kept_groups)) if self.layout else None
    self.ff = MoE(c, routed) if self.moe else SwiGLU(c, c.dense_ff, self.layout)

  def __call__(self, x, positions, segments, with_cells):
    attended, cells = self.attention(self.attention_norm(x), positions, segments)
    x = checkpoint_name(place(self, x + attended, *RESIDUAL), MIDDLE)
    x, stats = self.feed_forward(x, segments > 0)
    return x, (cells if with_cells else None, stats)

  def decode(self, carried, layer, prompt, positions, prompt_length, own_length, live):
    """One token of a layer. carried: x and the own cells of all layers, to which its cell is written in place: a scan
    copies what it takes and gives by layers."""
    x, own = carried
    normed = self.attention_norm(x)
    cell = self.attention.cells(normed, positions)
    attended = self.attention.decode(normed, positions, prompt[layer], own[layer], prompt_length, own_length, cell)
    return (self.attended(x, attended, live), write_cell(own, cell, layer, own_length)), None

  def decode_layer(self, x, cells, positions, prompt_length, own_length, live):
    """The same where the cells are the layer's alone, with its cell written first. Returns x and the longer own
    cells."""
    prompt, own = cells
    normed = self.attention_norm(x)
    cell = self.attention.cells(normed, positions)
    own = jax.lax.dynamic_update_slice_in_dim(own, cell[..., None, :], own_length, axis=2)
    return self.attended(x, self.attention.decode(normed, positions, prompt, own, prompt_length, own_length + 1),
                         live), own

  def attended(self, x, attended, live):
    return self.feed_forward(place(self, x + attended, *RESIDUAL), live)[0]

  def feed_forward(self, x, valid):
    normed = self.ff_norm(x)
    y, stats = self.ff(normed, valid) if self.moe else (self.ff(normed), None)
    return place(self, x + y, *RESIDUAL), stats


def write_cell(own_LxBxGxSxZ, cell_BxGxZ, layer, at):
  """Puts a cell of each completion in its place, in place.

  It is written with its neighbours, in a block that begins at a multiple of its length. tpu7x's compiler wants shorter
  tiles for a write that begins anywhere: it copied all layers' cells to those and back, in every layer.
  """
  layers, batch, group, cells, width = own_LxBxGxSxZ.shape
  block = math.gcd(cells, CELL_BLOCK)
  start = (layer, 0, 0, at // block * block, 0)
  old = jax.lax.dynamic_slice(own_LxBxGxSxZ, start, (1, batch, group, block, width))
  here = (jnp.arange(block) == at % block)[:, None]
  return jax.lax.dynamic_update_slice(own_LxBxGxSxZ, jnp.where(here, cell_BxGxZ[None, :, :, None], old), start)


def rematerialised(config: ModelConfig) -> type[nn.Module]:
  """Block, keeping for the backward pass what config.remat says."""
  if config.remat == 'none':
    return Block
  policy = {'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            'halves': jax.checkpoint_policies.save_only_these_names(MIDDLE), 'full': None}[config.remat]
  return nn.remat(Block, policy=policy, prevent_cse=False, static_argnums=(4,), methods=['__call__'])


def one_by_one(config: ModelConfig, layout: Layout | None) -> bool:
  """Whether layers are compiled one by one: few of them on CPU, where the copies that a scan makes of what each layer
  saves and reads cost an eighth of an update, and more of a decode step."""
  return config.layers <= FEW_LAYERS and (layout.platform if layout else jax.default_backend()) == 'cpu'


def stack(config: ModelConfig, moe: bool, layers: int, name: str, layout: Layout | None) -> nn.Module:
  """`layers` blocks whose weights have a leading layer axis; one block is compiled whatever the depth, but for
  `one_by_one`."""
  block = rematerialised(config)
  shared = dict(variable_axes={'params': 0, 'router': 0, 'picks': 0}, split_rngs={'params': True}, length=layers,
                unroll=layers if one_by_one(config, layout) else 1, metadata_params={nn.PARTITION_NAME: 'layers'})
  return nn.scan(block, methods={
    '__call__': dict(in_axes=(nn.broadcast, nn.broadcast, nn.broadcast), **shared),
    'decode': dict(in_axes=(0, *[nn.broadcast] * 5), **shared),
  })(config, moe, layout, name=name)


class Transformer(nn.Module):
  """Variables: `params` (trained) and `router` (the selection bias, moved by load and never by gradient).

  layout: where it runs, if on more than one device.
  """

  config: ModelConfig
  layout: Layout | None = None

  def setup(self):
    c = self.config
    self.embed = weight(self, 'embed', (c.vocab_size, c.width), ('vocab', 'embed'))
    if c.dense_layers:
      self.dense = stack(c, False, c.dense_layers, 'dense', self.layout)
    if c.moe_layers:
      self.moe = stack(c, True, c.moe_layers, 'moe', self.layout)
    self.final_norm = RMSNorm(c.norm_eps, c.param_dtype)
    if c.head == 'scalar':
      self.scalar = weight(self, 'scalar', (c.width,), ('norm',), nn.initializers.zeros)
    elif c.tied:
      self.unembed = self.embed.T
    else:
      self.unembed = weight(self, 'unembed', (c.width, c.vocab_size), ('embed', 'vocab'))
    if c.mtp_layers:
      self.mtp = MTP(c, self.layout)

  def __call__(self, ids_NxT, positions_NxT, segments_NxT, with_cells: bool = False) -> Output:
    """ids, positions, segments: int32 [N, T]; segment 0 is padding, others attend within themselves only.

    Positions count from 0 in each segment.
    """
    c, x = self.config, place(self, self.embed[ids_NxT], *RESIDUAL)
    cells, router = [], None
    if c.dense_layers:
      x, (dense_cells, _) = self.dense(x, positions_NxT, segments_NxT, with_cells)
      cells.append(dense_cells)
    if c.moe_layers:
      x, (moe_cells, router) = self.moe(x, positions_NxT, segments_NxT, with_cells)
      cells.append(moe_cells)
    return Output(x, jnp.concatenate(cells) if with_cells else None, router)

  def decode(self, ids_BxG, cache: LatentCache, live_BxG=None) -> tuple[jax.Array, LatentCache]:
    """One token of each completion, through absorbed attention. Returns hidden [B, G, D] and the longer cache.

    live_BxG: bool, False for completions that have ended, which no routed expert computes (None: all go on). The
    caller keeps own_length below the number of own cells.
    """
    c, x = self.config, place(self, self.embed[ids_BxG], *RESIDUAL)
    positions = jnp.broadcast_to((cache.prompt_length_B + cache.own_length)[:, None], ids_BxG.shape)
    live_BxG = jnp.ones(ids_BxG.shape, bool) if live_BxG is None else live_BxG
    now = positions, cache.prompt_length_B, cache.own_length, live_BxG
    prompt, own = cache.prompt_LxBxPxZ, cache.own_LxBxGxSxZ
    for start, end, run in ((0, c.dense_layers, 'dense'), (c.dense_layers, c.layers, 'moe')):
      if start == end:
        continue
      if isinstance(own, tuple):
        x, written = self.decode_layers(run, x, (prompt[start:end], own[start:end]), *now)
        own = (*own[:start], *written, *own[end:])
      else:
        (x, own), _ = getattr(self, run).decode((x, own), jnp.arange(start, end), prompt, *now)
    return x, cache.replace(own_LxBxGxSxZ=own, own_length=cache.own_length + 1)

  def decode_layers(self, run, x, cells, *now):
    """The layers of a run one after the other, each with its own cells and a view of the stacked weights. Returns x and
    a tuple of the longer own cells."""
    layers, written, picks = getattr(self, run), [], []
    block = Block(self.config, run == 'moe', self.layout, parent=None)
    for i, part in enumerate(zip(*cells, strict=True)):
      variables = jax.tree.map(lambda stacked, i=i: stacked[i], layers.variables)
      (x, own), picked = block.apply(variables, x, part, *now, method=block.decode_layer, mutable=['picks'])
      written.append(own)
      picks.append(picked)
    if picks[0] and self.is_mutable_collection('picks'):
      for name, value in jax.tree.map(lambda *each: jnp.stack(each), *picks)['picks'].items():
        layers.put_variable('picks', name, value)
    return x, tuple(written)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> float32 [..., V]."""
    return jnp.dot(self.final_norm(hidden), self.unembed, preferred_element_type=jnp.float32)

  def score(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> float32 [...]: the scalar head's number, which is 0 everywhere before training."""
    return jnp.dot(self.final_norm(hidden), self.scalar, preferred_element_type=jnp.float32)

  def second_hidden(self, hidden_NxTxD, ids_NxT, positions_NxT, segments_NxT) -> jax.Array:
    """Multi-token prediction, depth 1 (eq. 21, 22): hidden [N, T, D] at i, for `second_logits` of token i + 2.

    hidden: `Output.hidden_NxTxD` of the same ids. The last two positions of a segment predict nothing real. The module
    reads it after the final norm: so the released weights are run (`transformers`, for one); the paper leaves it open.
    """
    following = jnp.pad(ids_NxT[:, 1:], ((0, 0), (0, 1)))
    following = place(self, self.embed[following], *RESIDUAL)
    return self.mtp(self.final_norm(hidden_NxTxD), following, positions_NxT, segments_NxT)

  def second_logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] of `second_hidden` -> float32 [..., V], through the shared head (eq. 23)."""
    return jnp.dot(self.mtp.final_norm(hidden), self.unembed, preferred_element_type=jnp.float32)

  def everything(self, ids_NxT, positions_NxT, segments_NxT):
    """Touches every weight; for `init`."""
    hidden = self(ids_NxT, positions_NxT, segments_NxT).hidden_NxTxD
    if self.config.mtp_layers:
      self.second_logits(self.second_hidden(hidden, ids_NxT, positions_NxT, segments_NxT))
    return self.score(hidden) if self.config.head == 'scalar' else self.logits(hidden)


class MTP(nn.Module):
  """One further MoE block over [norm(embedding of the next token); norm(hidden)], sharing embedding and head.

  Embedding first, as the released weights have it; the printed eq. 21 has the hidden state first.
  """

  config: ModelConfig
  layout: Layout | None = None

  def setup(self):
    c = self.config
    self.embed_norm = RMSNorm(c.norm_eps, c.param_dtype)
    self.hidden_norm = RMSNorm(c.norm_eps, c.param_dtype)
    self.project = weight(self, 'project', (2 * c.width, c.width), ('mlp', 'embed'))
    self.block = rematerialised(c)(c, True, self.layout)
    self.final_norm = RMSNorm(c.norm_eps, c.param_dtype)

  def __call__(self, hidden, following, positions, segments):
    x = jnp.concatenate([self.embed_norm(following), self.hidden_norm(hidden)], axis=-1) @ self.project
    return self.block(x, positions, segments, False)[0]


def for_compute(config: ModelConfig, params: dict) -> dict:
  """The weights in compute_dtype where they lie, all but those that are used in their own precision (norms, router).

  Taken at the head of a microbatch, so that what is gathered, and what gradients are scattered in, is compute_dtype.
  """
  def cast(path, x):
    own = any(word in jax.tree_util.keystr(path) for word in ("'scale'", "'router'"))
    return x if own else x.astype(config.compute_dtype)
  return jax.tree_util.tree_map_with_path(cast, params)


def whole_vocabulary(net: Transformer, params: dict) -> dict:
  """The weights with embedding and unembedding gathered over all mesh axes but the vocabulary's: once a microbatch,
  rather than once a chunk of tokens."""
  axes = {'embed': ('vocab', None), 'unembed': (None, 'vocab')}
  return params | {name: place(net, params[name], *axes[name]) for name in axes if name in params}


def init(config: ModelConfig, key: jax.Array) -> dict:
  """Fresh variables, boxed with their logical axes: {'params': …, 'router': …}. Jit it with `out_shardings`, or
  take `jax.eval_shape` of it, so that big weights never exist whole on one device."""
  ids = jnp.zeros((1, 8), jnp.int32)
  model = Transformer(config)
  return dict(model.init(key, ids, ids, ids + 1, method=model.everything))


def parameter_count(config: ModelConfig, mtp: bool = False) -> int:
  """Weights of the main model, the router's selection bias included (it is in the released files); `mtp` adds the
  prediction module's own."""
  shapes = nn.unbox(jax.eval_shape(lambda key: init(config, key), jax.random.key(0)))
  if not mtp:
    shapes = jax.tree.map(lambda x: x, shapes)
    for part in shapes.values():
      part.pop('mtp', None)
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
