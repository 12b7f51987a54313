"""DeepSeekMoE: shared and routed experts, a float32 router, and expert compute that drops no token.

DeepSeek-V3 (arXiv:2412.19437) eq. 12 to 20. `experts` is the one door to the routed experts; behind it are three
forms of the same sum, chosen by shape and backend:
  ragged  sort by expert, grouped products with `ragged_dot`: TPU and GPU.
  rounds  batched products over a buffer of bounded capacity; what overflows goes in further rounds, by blocks: CPU.
  dense   every expert on every token: a handful of tokens.
"""

import functools
import math

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_rl.models import expert_parallel
from moe_rl.models.config import ModelConfig
from moe_rl.models.layers import SwiGLU, place, product, weight
from moe_rl.runtime.mesh import Layout

FIRST_ROUND, BLOCK = 1.25, 0.25  # slots of an expert's buffer, and of a block of overflow, over its even share
JOINED_BELOW = 2**20  # entries of gate and up weights; beyond, copying them side by side costs more than it saves
DENSE_BELOW = 32  # tokens; below, sorting and gathering cost more than the products they save (2-core CPU)


@flax.struct.dataclass
class RouterStats:
  """load_E: float32, (token, pick) pairs an expert received, padding not counted; balance: float32 scalar, eq. 17."""

  load_E: jax.Array
  balance: jax.Array


def choose(score_NxE: jax.Array, bias_E: jax.Array | None, config: ModelConfig) -> jax.Array:
  """int32 [N, K]: the experts picked by score + bias, within the best groups (eq. 16, node-limited routing); N may be
  several axes.

  A group's worth is the sum of its two best entries with a bias (V3), its best without (V2). Experts of other
  groups are masked with -inf: with 0, as some implementations have it, a negative bias could make them win.
  """
  select = score_NxE if bias_E is None else score_NxE + bias_E
  if config.kept_groups < config.groups:
    grouped = select.reshape(*select.shape[:-1], config.groups, config.experts // config.groups)
    best = min(2, grouped.shape[-1]) if config.score == 'sigmoid' else 1
    worth = jax.lax.top_k(grouped, best)[0].sum(-1)
    kept = jax.lax.top_k(worth, config.kept_groups)[1]
    mask = jax.nn.one_hot(kept, config.groups, dtype=bool).any(axis=-2)
    select = jnp.where(mask[..., None], grouped, -jnp.inf).reshape(select.shape)
  return jax.lax.top_k(select, config.top_k)[1]


def gates(score_NxE: jax.Array, picked_NxK: jax.Array, config: ModelConfig) -> jax.Array:
  """float32 [N, K]: weights of the picked experts from the scores without bias (eq. 13), scaled."""
  gate = jnp.take_along_axis(score_NxE, picked_NxK, axis=-1)
  if config.norm_top_k:
    gate = gate / (gate.sum(-1, keepdims=True) + 1e-20)
  return gate * config.route_scale


def balance_loss(score_NxTxE: jax.Array, valid_NxT: jax.Array, config: ModelConfig) -> jax.Array:
  """Sequence-wise balance loss sum_i f_i P_i, a mean over rows with a token (eq. 17 to 20), without its factor.

  f counts the top K of the unbiased scores and carries no gradient. Differs from the paper in that a row of packed
  documents counts as one sequence, as in pre-training on packed rows. Even routing gives 1.
  """
  valid = valid_NxT[..., None].astype(jnp.float32)
  tokens_Nx1 = jnp.maximum(valid.sum(1), 1.0)
  picked = jax.lax.top_k(score_NxTxE, config.top_k)[1]
  hit_NxTxE = jax.nn.one_hot(picked, config.experts, dtype=jnp.float32).sum(2)
  f = (hit_NxTxE * valid).sum(1) * config.experts / (config.top_k * tokens_Nx1)
  p = (score_NxTxE / score_NxTxE.sum(-1, keepdims=True) * valid).sum(1) / tokens_Nx1
  rows = jnp.maximum(valid_NxT.any(1).sum(), 1)
  return (jax.lax.stop_gradient(f) * p * valid_NxT.any(1)[:, None]).sum() / rows


def update_bias(bias_LxE: jax.Array, load_LxE: jax.Array, rate: float) -> jax.Array:
  """b += rate * sign(mean load - load): the aux-loss-free balance, after each step on the global load."""
  return bias_LxE + rate * jnp.sign(load_LxE.mean(-1, keepdims=True) - load_LxE)


def move_bias(router: dict, load_LxE, rate: float) -> dict:
  """The router collection after one balance step; the MTP module's own bias, whose load is not tracked, stays."""
  if not rate or 'moe' not in router:
    return router
  flat = flax.traverse_util.flatten_dict(router)
  key = ('moe', 'ff', 'bias')
  flat[key] = update_bias(flat[key], load_LxE, rate)
  return flax.traverse_util.unflatten_dict(flat)


def router_metrics(router: dict, load_LxE) -> dict:
  """load_max: the fullest expert over the even share, 1 is perfect; bias_max: the largest selection bias."""
  if not load_LxE.size:
    return {}
  out = {'load_max': (load_LxE.max(-1) / jnp.maximum(load_LxE.mean(-1), 1e-9)).max(),
         'load_min': (load_LxE.min(-1) / jnp.maximum(load_LxE.mean(-1), 1e-9)).min()}
  biases = jax.tree.leaves(router)
  if biases:
    out['bias_max'] = jnp.max(jnp.stack([jnp.abs(b).max() for b in biases]))
  return out


def experts(x_NxD, picked_NxK, gate_NxK, gate_ExDxF, up_ExDxF, down_ExFxD, path: str = 'auto') -> jax.Array:
  """sum_k gate[n, k] SwiGLU_{picked[n, k]}(x[n]): [N, D]. Dropless on every path.

  picked: int32 in 0..E; E marks a pair that computes nothing (padding). All paths agree to rounding. path: 'dense',
  'ragged' or 'rounds'; 'cpu': the first or the last, by shape; 'auto': by the default backend.
  """
  if path == 'auto':
    path = 'cpu' if jax.default_backend() == 'cpu' else 'ragged'
  if path == 'cpu':
    path = 'dense' if x_NxD.shape[0] < DENSE_BELOW else 'rounds'
  gate_NxK = gate_NxK.astype(x_NxD.dtype)
  weights = (gate_ExDxF, up_ExDxF, down_ExFxD)
  if path == 'dense':
    return _dense(x_NxD, picked_NxK, gate_NxK, *weights)
  if path == 'ragged':
    return _ragged(x_NxD, picked_NxK, gate_NxK, *weights)
  return _rounds(x_NxD, gate_NxK, *weights, picked_NxK)


@functools.cache
def experts_of(path: str, platform: str):
  """`experts` by the given path, 'auto' being read for a platform that may not be the default backend."""
  if path == 'auto':
    path = 'cpu' if platform == 'cpu' else 'ragged'
  return functools.partial(experts, path=path)


def _dense(x, picked, gate, w_gate, w_up, w_down):
  gate_NxE = jnp.zeros((x.shape[0], w_gate.shape[0] + 1), x.dtype)
  gate_NxE = gate_NxE.at[jnp.arange(x.shape[0])[:, None], picked].add(gate)[:, :-1]
  hidden = nn.silu(jnp.einsum('nd,edf->nef', x, w_gate)) * jnp.einsum('nd,edf->nef', x, w_up)
  return jnp.einsum('nef,efd->nd', hidden * gate_NxE[..., None], w_down)


@jax.custom_vjp
def _ragged(x, picked, gate, w_gate, w_up, w_down):
  """Grouped products over pairs sorted by expert. The backward pass is written out so that it computes the hidden layer
  again and the output not: 8 products against the 9 of differentiating what is computed again."""
  return _ragged_forward(x, picked, gate, w_gate, w_up, w_down)[0]


def _pairs(picked, num_experts):
  """(the pairs by expert, pairs of each expert, whether a place holds a pair of any, [pairs, 1])."""
  pairs = expert_parallel.Pairs(picked, num_experts)
  return pairs, pairs.count_E, (jnp.arange(picked.size) < pairs.count_E.sum())[:, None]


def _ragged_forward(x, picked, gate, w_gate, w_up, w_down):
  pairs, sizes, used = _pairs(picked, w_gate.shape[0])
  rows = pairs.of_tokens(x)
  hidden = nn.silu(jax.lax.ragged_dot(rows, w_gate, sizes)) * jax.lax.ragged_dot(rows, w_up, sizes)
  # Rows beyond the last group belong to no expert; what a backend leaves there is undefined.
  y = jnp.where(used, jax.lax.ragged_dot(hidden, w_down, sizes), 0) * pairs.of_picks(gate)[:, None]
  return pairs.by_pick(y).sum(1), (x, picked, gate, w_gate, w_up, w_down)


def _ragged_backward(saved, dy):
  x, picked, gate, w_gate, w_up, w_down = saved
  pairs, sizes, used = _pairs(picked, w_gate.shape[0])
  rows, drows, gates = pairs.of_tokens(x), pairs.of_tokens(dy), pairs.of_picks(gate)[:, None]

  def product_and_pullback(rows, w):
    out, pullback = jax.vjp(lambda rows, w: jax.lax.ragged_dot(rows, w, sizes), rows, w)
    return jnp.where(used, out, 0), pullback
  a, pull_gate = product_and_pullback(rows, w_gate)
  b, pull_up = product_and_pullback(rows, w_up)
  sigmoid = nn.sigmoid(a)
  silu = a * sigmoid
  hidden = silu * b
  _, pull_down = product_and_pullback(hidden * gates, w_down)  # its product is not used, and so not computed
  dhidden, dw_down = pull_down(jnp.where(used, drows, 0))
  dhidden = jnp.where(used, dhidden, 0)
  dgate = (dhidden * hidden).sum(-1)
  dhidden = dhidden * gates
  (dx_gate, dw_gate), (dx_up, dw_up) = (
    pull_gate(dhidden * b * (sigmoid + silu * (1 - sigmoid))), pull_up(dhidden * silu))
  dx = pairs.by_pick(jnp.where(used, dx_gate + dx_up, 0)).sum(1)
  return dx, None, pairs.by_pick(dgate), dw_gate, dw_up, dw_down


_ragged.defvjp(_ragged_forward, _ragged_backward)


def _plan(picked, num_experts):
  """Where each (token, pick) pair sits: order by expert, first place and count of each expert, rank within it."""
  flat = picked.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  place = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=order.dtype))
  count_E = jnp.bincount(flat, length=num_experts + 1)[:-1].astype(jnp.int32)
  first_E = jnp.cumsum(count_E) - count_E
  rank = (place - jnp.append(first_E, count_E.sum())[flat]).reshape(picked.shape)
  return order, first_E, count_E, rank


def _sizes(pairs: int, num_experts: int) -> tuple[int, int, int]:
  """Slots an expert in the first round; slots of a block in a further one, and how many blocks that has."""
  even = -(-pairs // num_experts)
  first, block = (min(pairs, -(-math.ceil(even * share) // 8) * 8) for share in (FIRST_ROUND, BLOCK))
  return first, block, max(1, num_experts // 8)


def _first_round(plan, picked, slots, num_experts):
  """pair_ExC: which pair sits in a slot (any, where not used); used_ExC: bool; slot_NxK: where a pair sits, E * C for
  pairs of another round."""
  order, first_E, count_E, rank_NxK = plan
  rank_C = jnp.arange(slots)
  pair_ExC = order[jnp.minimum(first_E[:, None] + rank_C, picked.size - 1)]
  here = (rank_NxK < slots) & (picked < num_experts)
  slot_NxK = jnp.where(here, picked * slots + rank_NxK, num_experts * slots)
  return pair_ExC, rank_C < count_E[:, None], slot_NxK


def _over_blocks(body, total, plan, sizes):
  """total = body(total, expert_G, pair_GxC, used_GxC) over what the first round had no room for.

  An expert's overflow is cut into blocks, and each round takes G of them, whosever they are: so an expert that
  overflows costs its own blocks and not a pass over all experts. Blocks of the last round may be empty.
  """
  order, first_E, count_E, _ = plan
  slots, block, group = sizes
  blocks_E = -(-jnp.maximum(count_E - slots, 0) // block)
  end_E = jnp.cumsum(blocks_E)

  def one_round(r, total):
    number_G = r * group + jnp.arange(group)
    expert_G = jnp.minimum(jnp.searchsorted(end_E, number_G, side='right'), count_E.size - 1)
    nth_G = number_G - (end_E - blocks_E)[expert_G]
    rank_GxC = slots + nth_G[:, None] * block + jnp.arange(block)
    used_GxC = (number_G < end_E[-1])[:, None] & (rank_GxC < count_E[expert_G][:, None])
    pair_GxC = order[jnp.clip(first_E[expert_G][:, None] + rank_GxC, 0, order.size - 1)]
    return body(total, expert_G, pair_GxC, used_GxC)
  return jax.lax.fori_loop(0, -(-end_E[-1] // group), one_round, total)


def _take_slots(y_ExCxD, slot_NxK):
  """sum_k y[slot[n, k]]; the slot past the end is zero."""
  flat = y_ExCxD.reshape(-1, y_ExCxD.shape[-1])
  picked = flat.at[slot_NxK].get(mode='fill', fill_value=0)
  return picked.sum(1)


def _joined(w_gate, w_up) -> list[jax.Array]:
  """The two side by side, as one product is faster than two; as they are, where they are large."""
  return [w_gate, w_up] if 2 * w_gate.size > JOINED_BELOW else [jnp.concatenate([w_gate, w_up], axis=-1)]


def _gate_and_up(rows, w_in):
  """Products of rows [E, C, D] with both."""
  products = [_mm(rows, w) for w in w_in]
  return products if len(products) == 2 else jnp.split(products[0], 2, axis=-1)


@jax.custom_vjp
def _rounds(x, gate, w_gate, w_up, w_down, picked):
  """Experts over buffers [E, C, D]: batched products of all experts once, then of blocks of those that overflow.

  The number of rounds depends on the data, which reverse-mode differentiation of a loop cannot follow; so the
  backward pass is written out. In the first round it gathers where the transpose of a gather would scatter (several
  times faster on CPU). It recomputes the hidden layer, so that nothing of size [rounds, E, C, F] is kept.
  """
  return _rounds_forward(x, gate, w_gate, w_up, w_down, picked)[0]


def _rounds_forward(x, gate, w_gate, w_up, w_down, picked):
  num_experts, top_k = w_gate.shape[0], picked.shape[1]
  plan, sizes = _plan(picked, num_experts), _sizes(picked.size, num_experts)
  w_in = _joined(w_gate, w_up)

  def compute(pair, used, w_in, w_down):
    a, b = _gate_and_up(x[pair // top_k], w_in)
    return _mm(nn.silu(a) * b, w_down) * (gate.reshape(-1)[pair] * used)[..., None]

  def block(y, expert, pair, used):
    return y.at[pair // top_k].add(compute(pair, used, [w[expert] for w in w_in], w_down[expert]))
  pair, used, slot = _first_round(plan, picked, sizes[0], num_experts)
  y = _over_blocks(block, _take_slots(compute(pair, used, w_in, w_down), slot), plan, sizes)
  return y, (x, gate, w_gate, w_up, w_down, picked)


def _rounds_backward(saved, dy):
  x, gate, w_gate, w_up, w_down, picked = saved
  num_experts, top_k = w_gate.shape[0], picked.shape[1]
  plan, sizes = _plan(picked, num_experts), _sizes(picked.size, num_experts)
  w_in = _joined(w_gate, w_up)

  def compute(pair, used, w_in, w_down):
    """Gradients of the rows and gates of some slots, and of their experts' weights."""
    rows, dout = x[pair // top_k], dy[pair // top_k] * used[..., None]
    gate_slot = gate.reshape(-1)[pair][..., None]
    a, b = _gate_and_up(rows, w_in)
    sigmoid = nn.sigmoid(a)
    silu = a * sigmoid
    hidden = silu * b
    dhidden = _mm(dout, w_down.swapaxes(1, 2))
    dgate = (dhidden * hidden).sum(-1)
    dhidden = dhidden * gate_slot
    dab = [dhidden * b * (sigmoid + silu * (1 - sigmoid)), dhidden * silu]
    dab = dab if len(w_in) == 2 else [jnp.concatenate(dab, axis=-1)]
    drows = sum(_mm(d, w.swapaxes(1, 2)) for d, w in zip(dab, w_in, strict=True))
    return drows, dgate, [_outer(rows, d) for d in dab], _outer(hidden * gate_slot, dout)

  def block(grads, expert, pair, used):
    dx, dgate, dw_in, dw_down = compute(pair, used, [w[expert] for w in w_in], w_down[expert])
    return (grads[0].at[pair // top_k].add(dx), grads[1].at[pair].add(dgate),
            [total.at[expert].add(dw) for total, dw in zip(grads[2], dw_in, strict=True)],
            grads[3].at[expert].add(dw_down))
  pair, used, slot = _first_round(plan, picked, sizes[0], num_experts)
  dx, dgate, dw_in, dw_down = compute(pair, used, w_in, w_down)
  first = (_take_slots(dx, slot), dgate.reshape(-1).at[slot.reshape(-1)].get(mode='fill', fill_value=0), dw_in, dw_down)
  dx, dgate, dw_in, dw_down = _over_blocks(block, first, plan, sizes)
  dw_gate_up = dw_in if len(dw_in) == 2 else jnp.split(dw_in[0], 2, axis=-1)
  return dx, dgate.reshape(gate.shape), *dw_gate_up, dw_down, None


_rounds.defvjp(_rounds_forward, _rounds_backward)
_mm = functools.partial(jnp.einsum, 'eca,eab->ecb')
_outer = functools.partial(jnp.einsum, 'eca,ecb->eab')


class MoE(nn.Module):
  """y = sum of shared experts + gated sum of the picked ones; the residual is the caller's."""

  config: ModelConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x_NxTxD: jax.Array, valid_NxT: jax.Array) -> tuple[jax.Array, RouterStats]:
    """valid_NxT: bool, False on padding, which no routed expert computes and no count sees."""
    c = self.config
    router_init = nn.with_logical_partitioning(nn.initializers.normal(c.init_std), ('embed', 'router'))
    router = self.param('router', router_init, (c.width, c.experts), jnp.dtype(c.param_dtype))
    logits = product(self, x_NxTxD.astype(jnp.float32), router.astype(jnp.float32), precision='highest')
    if c.score == 'sigmoid':
      score_NxTxE = nn.sigmoid(logits)
      bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ('router',))
      bias = self.variable('router', 'bias', bias_init, None, (c.experts,), jnp.float32).value
    else:
      score_NxTxE, bias = nn.softmax(logits), None
    picked = self.recorded_or(choose(jax.lax.stop_gradient(score_NxTxE), bias, c))
    gate = gates(score_NxTxE, picked, c)
    picked = jnp.where(valid_NxT[..., None], picked, c.experts)

    shape, axes = (c.experts, c.width, c.expert_ff), ('experts', 'expert_rows', 'expert_columns')
    w_gate, w_up = weight(self, 'gate', shape, axes), weight(self, 'up', shape, axes)
    w_down = weight(self, 'down', (c.experts, c.expert_ff, c.width), axes)
    compute = experts_of(c.expert_path, self.layout.platform if self.layout else jax.default_backend())
    if self.layout and self.layout.mesh.size > 1:
      picked, gate = (place(self, a, 'batch', 'places', None) for a in (picked, gate))
      y, load = expert_parallel.sharded(self.layout, compute, x_NxTxD, picked, gate, w_gate, w_up, w_down)
    else:
      flat = (a.reshape(-1, a.shape[-1]) for a in (x_NxTxD, picked, gate))
      y = compute(*flat, w_gate, w_up, w_down).reshape(x_NxTxD.shape)
      load = jnp.bincount(picked.reshape(-1), length=c.experts + 1)[:-1].astype(jnp.float32)
    if c.shared_experts:
      y = y + SwiGLU(c, c.shared_experts * c.expert_ff, self.layout, name='shared')(x_NxTxD)
    return y, RouterStats(load_E=load, balance=balance_loss(score_NxTxE, valid_NxT, c))

  def recorded_or(self, picked_NxTxK: jax.Array) -> jax.Array:
    """The picks that are used: those of the collection `picks`, where it is given and holds one (-1: none).

    A collection that can be written to is filled instead. So `apply(…, mutable=['picks'])` records where every token
    went, int16 [N, T, K] a layer, and `apply({…, 'picks': recorded}, …)` sends it there again. Only the choice is
    replayed: gates are computed anew, so gradients flow through them; the selection bias, which acts on the choice
    alone, is idle for replayed tokens.
    """
    if self.is_mutable_collection('picks') and not self.is_initializing():
      self.put_variable('picks', 'experts', picked_NxTxK.astype(jnp.int16))
    elif self.has_variable('picks', 'experts'):
      recorded = self.get_variable('picks', 'experts').astype(picked_NxTxK.dtype)
      picked_NxTxK = jnp.where(recorded >= 0, recorded, picked_NxTxK)
    return picked_NxTxK
