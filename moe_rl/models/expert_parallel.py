"""Experts on many devices: tokens travel to their experts and back, and none is dropped.

Every device holds some tokens and, of some experts, the weights. A round sends each expert's device the next part of
the tokens that want it, as many as its buffer holds; what overflows goes in a further round, as many as the fullest
device needs. So memory is bounded by the buffer whatever the router does, and even routing takes one round.

The order of things on a device, in a group of P devices that hold all E experts between them:

    tokens [n, D] --sort by expert--> pairs [n K, D] --exchange--> buffer [C, D] --experts--> buffer --exchange--> pairs

All devices know all counts [P, E] (one small gather), from which each works out who sends what to whom and where.

Where the router keeps a token's experts within few devices (node-limited routing: V3's 8 picks lie in 4 of 8 groups, so
on 4 devices of 8), a token goes once to each of its devices and not once for each pick; there it meets all its experts,
and their weighted sum comes back. That halves what V3 moves.

Weights may be sharded in their rows besides: they are gathered for the layer, and their gradients scattered
back, by hand, so that no partitioner turns the scatter into a sum over everything.
"""

import functools

import flax
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_rl.runtime.mesh import TRAINING, Layout
from moe_rl.runtime.programs import EXCHANGES, PARTS

EXPERT_AXES = TRAINING['experts']  # the devices along these hold all experts between them, in every table
BUFFER, LEAST_BUFFER = 1.25, 256  # of a device, over its even share of the pairs; and at least so many of them
EVEN_PARTS = 2  # that the pairs of a round's rows are worked on in, where they are even: half the memory


@flax.struct.dataclass
class Traffic:
  """Who sends what to whom, in pairs; known to every device of the group alike.

  to_SxP: int32, pairs from source s to destination p; first_SxP: where they begin among the source's sorted pairs;
  before_SxP: where they begin in the destination's stream; counts_SxE: pairs by expert.
  """

  to_SxP: jax.Array
  first_SxP: jax.Array
  before_SxP: jax.Array
  counts_SxE: jax.Array


def count_traffic(counts_SxE: jax.Array) -> Traffic:
  """From each source's pairs by expert, experts standing in order of their devices."""
  sources = counts_SxE.shape[0]
  to = counts_SxE.reshape(sources, sources, -1).sum(-1)
  return Traffic(to, jnp.cumsum(to, 1) - to, jnp.cumsum(to, 0) - to, counts_SxE)


def window(traffic: Traffic, start, capacity: int) -> tuple[jax.Array, jax.Array]:
  """(skipped, sent) int32 [S, P]: of the pairs of each source and destination, those of earlier rounds, and those of
  the round that fills places start .. start + capacity of every destination's stream."""
  def passed(place):
    return jnp.clip(place - traffic.before_SxP, 0, traffic.to_SxP)
  skipped = passed(start)
  return skipped, passed(start + capacity) - skipped


def exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, native: bool):
  """`jax.lax.ragged_all_to_all` over the group: operand [R, ...] into output [Q, ...], int32 [P] each.

  native: the backend has it. XLA on CPU does not: there blocks as large as the largest that can be go by all_to_all.
  """
  if native:
    return jax.lax.ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes,
                                     axis_name=EXPERT_AXES)
  rows = jnp.arange(min(operand.shape[0], output.shape[0]))
  blocks = operand.at[input_offsets[:, None] + rows].get(mode='clip')
  blocks, offsets = (jax.lax.all_to_all(a, EXPERT_AXES, 0, 0) for a in (blocks, output_offsets[:, None]))
  place = jnp.where(rows < recv_sizes[:, None], offsets + rows, output.shape[0])
  return output.at[place].set(blocks, mode='drop')


class Exchange:
  """One round on one device: `there` brings pairs into the buffer, `back` brings what became of them back."""

  def __init__(self, traffic: Traffic, start, capacity: int, native: bool):
    t, me = traffic, jax.lax.axis_index(EXPERT_AXES)
    skipped, sent = window(t, start, capacity)
    in_pairs, in_buffer = t.first_SxP + skipped, t.before_SxP + skipped - start
    self.sending = (in_pairs[me], sent[me], in_buffer[me], sent[:, me])
    self.returning = (in_buffer[:, me], sent[:, me], in_pairs[:, me], sent[me])
    self.native, self.capacity = native, capacity
    # The stream of a destination holds source after source, and each source's pairs expert after expert.
    local = t.counts_SxE.shape[1] // t.counts_SxE.shape[0]
    ends = jnp.cumsum(jax.lax.dynamic_slice_in_dim(t.counts_SxE, me * local, local, axis=1).reshape(-1))
    place = start + jnp.arange(capacity)
    part = jnp.searchsorted(ends, place, side='right', method='compare_all')
    self.expert_C = jnp.where(place < ends[-1], part % local, local).astype(jnp.int32)  # `local`: nobody's

  def there(self, pairs):
    """[n K, ...] -> [C, ...], zeros where no pair sits."""
    return exchange(pairs, jnp.zeros((self.capacity, *pairs.shape[1:]), pairs.dtype), *self.sending,
                    self.native)

  def back(self, buffer, pairs):
    """[C, ...] into pairs [n K, ...], of which the other rounds' places stay."""
    return exchange(buffer, pairs, *self.returning, self.native)


class Pairs:
  """A device's (token, pick) pairs sorted by expert, those that compute nothing last; picked int32 [n, K] in 0..E."""

  def __init__(self, picked, num_experts: int):
    flat = picked.reshape(-1)
    self.order, self.top_k = jnp.argsort(flat, stable=True), picked.shape[1]
    self.sorted = flat[self.order]
    self.place = jnp.zeros_like(self.order).at[self.order].set(jnp.arange(flat.size, dtype=self.order.dtype))
    self.count_E = jnp.bincount(flat, length=num_experts + 1)[:-1].astype(jnp.int32)

  def of_tokens(self, x):
    """[n, D] -> [n K, D]."""
    return x[self.order // self.top_k]

  def of_picks(self, gate):
    """[n, K] -> [n K]."""
    return gate.reshape(-1)[self.order]

  def by_pick(self, pairs):
    """[n K, ...] -> [n, K, ...]."""
    return pairs[self.place].reshape(-1, self.top_k, *pairs.shape[1:])


def most_devices(layout: Layout, top_k: int) -> int:
  """To how many devices of a group a token goes at most; `layout.routing` says how far its experts lie apart."""
  (groups, kept), devices = layout.routing, layout.size(EXPERT_AXES)
  if groups % devices == 0:  # whole groups of experts on a device
    return min(top_k, devices, kept)
  return min(top_k, devices, kept * devices // groups if devices % groups == 0 else devices)


def destinations(picked, local: int, devices: int, most: int):
  """(int32 [n, most]: the devices that have a token's experts, each once, `devices` where there are fewer; bool [n]:
  whether there are more, which no router of `most_devices` makes)."""
  device = jnp.sort(picked // local, axis=1)
  again = jnp.pad(device[:, 1:] == device[:, :-1], ((0, 0), (1, 0)))
  each = jnp.sort(jnp.where(again, devices, device), axis=1)
  return each[:, :most], each[:, most] < devices


class Group:
  """The devices that hold all experts between them, seen from inside shard_map on one of them. A row that is sent is a
  (token, pick) pair."""

  def __init__(self, picked, num_experts: int, layout: Layout, local_experts):
    self.picked, self.devices, self.local = picked, layout.size(EXPERT_AXES), local_experts
    self.own = num_experts // self.devices
    self.pairs, self.native = self.rows(num_experts, layout), layout.platform != 'cpu'
    self.traffic = count_traffic(jax.lax.all_gather(self.pairs.count_E, EXPERT_AXES))
    self.capacity = buffer(self.pairs.order.size, self.devices)
    fullest = jax.lax.pmax(self.traffic.to_SxP.sum(0).max(), layout.mesh.axis_names)  # all groups take as many rounds
    self.rounds = jnp.maximum(-(-fullest // self.capacity), 1)

  def rows(self, num_experts: int, layout: Layout) -> Pairs:
    return Pairs(self.picked, num_experts)

  def over_rounds(self, body, total):
    def one(i, total):
      return body(Exchange(self.traffic, i * self.capacity, self.capacity, self.native), total)
    with jax.named_scope(EXCHANGES):
      return jax.lax.fori_loop(0, self.rounds, one, total)

  def forward(self, x, gate, *weights):
    """y [n, D] of tokens x [n, D], gates [n, K] and this device's own experts' weights."""
    pairs = self.pairs.of_tokens(x)

    def body(at, out):
      rows = at.there(pairs)
      return at.back(self.local(rows, at.expert_C[:, None], jnp.ones((at.capacity, 1), x.dtype), *weights), out)
    out = self.over_rounds(body, jnp.zeros_like(pairs))
    return (self.pairs.by_pick(out) * gate[..., None]).sum(1)

  def backward(self, dy, x, gate, *weights):
    """Gradients by x, gate and the weights (float32). Rows are sent again, and the hidden layer is computed again."""
    pairs_x, pairs_dy, pairs_gate = self.pairs.of_tokens(x), self.pairs.of_tokens(dy), self.pairs.of_picks(gate)

    def body(at, grads):
      dx, dgate, dweights = grads
      rows, gates, drows = at.there(pairs_x), at.there(pairs_gate)[:, None], at.there(pairs_dy)
      drows, dgates, dw = self.pullback(drows, at.expert_C, rows, gates, weights)
      return at.back(drows, dx), at.back(dgates[:, 0], dgate), added(dweights, dw)
    zeros = (jnp.zeros_like(pairs_x), jnp.zeros_like(pairs_gate), zero_gradients(weights))
    dx, dgate, dweights = self.over_rounds(body, zeros)
    return self.pairs.by_pick(dx).sum(1), self.pairs.by_pick(dgate), dweights

  def pullback(self, drows, expert_C, rows, gates_Cx1, weights):
    """Gradients by rows, gates and weights of single pairs' experts."""
    _, vjp = jax.vjp(lambda rows, gates, *w: self.local(rows, expert_C[:, None], gates, *w), rows, gates_Cx1, *weights)
    drows, dgates, *dweights = vjp(drows)
    return drows, dgates, dweights


class DeviceGroup(Group):
  """The same where a row that is sent is a token, with all its picks that lie on one device, and what comes back is the
  sum over them. A token that goes to more devices than the router's rule allows gets NaN, so that it shows."""

  def rows(self, num_experts: int, layout: Layout) -> Pairs:
    device, self.beyond = destinations(self.picked, self.own, self.devices, most_devices(layout, self.picked.shape[1]))
    return Pairs(device, self.devices)

  def sent(self, gate):
    """[rows, 2 K]: gates, and picks as the receiving device numbers them, `own` where an expert is another's."""
    token, device = self.pairs.order // self.pairs.top_k, self.pairs.sorted
    picked = self.picked[token]
    picks = jnp.where(picked // self.own == device[:, None], picked % self.own, self.own)
    wide = gate.dtype if self.own <= 256 else jnp.float32  # bfloat16 has these integers
    return jnp.concatenate([gate[token].astype(wide), picks.astype(wide)], axis=1)

  def received(self, at: Exchange, sent) -> 'Arrived':
    gates, picks = jnp.split(at.there(sent), 2, axis=1)
    picks = jnp.where(at.expert_C[:, None] == 0, picks.astype(jnp.int32), self.own)
    return Arrived(picks, gates, self.own, buffer(-(-self.picked.size // EVEN_PARTS), self.devices))

  def forward(self, x, gate, *weights):
    rows, sent = self.pairs.of_tokens(x), self.sent(gate)

    def body(at, out):
      arrived, rows_C = self.received(at, sent), at.there(rows)

      def part(some, y):
        return y + some.summed(self.local(rows_C[some.row_S], some.expert_S[:, None], some.gate_Sx1, *weights))
      return at.back(arrived.over_parts(part, jnp.zeros_like(rows_C)), out)
    y = self.pairs.by_pick(self.over_rounds(body, jnp.zeros_like(rows))).sum(1)
    return jnp.where(self.beyond[:, None], jnp.nan, y)

  def backward(self, dy, x, gate, *weights):
    rows_x, rows_dy, sent = self.pairs.of_tokens(x), self.pairs.of_tokens(dy), self.sent(gate)

    def body(at, grads):
      arrived, rows, drows = self.received(at, sent), at.there(rows_x), at.there(rows_dy)

      def part(some, grads):
        dx, dgate, dweights = grads
        drow, dg, dw = self.pullback(drows[some.row_S], some.expert_S, rows[some.row_S], some.gate_Sx1, weights)
        return dx + some.summed(drow), dgate + some.by_pick(dg[:, 0]), added(dweights, dw)
      zeros = jnp.zeros_like(rows), jnp.zeros(arrived.picks_CxK.shape, x.dtype), grads[2]
      dx, dgate, dweights = arrived.over_parts(part, zeros)
      return at.back(dx, grads[0]), at.back(dgate, grads[1]), dweights
    zeros = jnp.zeros_like(rows_x), jnp.zeros((rows_x.shape[0], gate.shape[1]), gate.dtype), zero_gradients(weights)
    dx, dgate, dweights = self.over_rounds(body, zeros)
    return self.pairs.by_pick(dx).sum(1), self.pairs.by_pick(dgate).sum(1), dweights


class Arrived:
  """Rows that came to a device in a round, each with some picks: pairs, worked on in parts of `size`, as many as there
  are pairs for."""

  def __init__(self, picks_CxK, gates_CxK, nobody: int, size: int):
    self.picks_CxK, self.gate, self.nobody = picks_CxK, gates_CxK.reshape(-1), nobody
    self.size = min(size, picks_CxK.size)
    self.pick = picks_CxK.reshape(-1)
    used = self.pick < nobody
    self.total = used.sum()
    self.order = jnp.pad(jnp.argsort(~used, stable=True), (0, self.size))
    self.place_CxK = jnp.where(used, jnp.cumsum(used) - 1, used.size + self.size).reshape(picks_CxK.shape)

  def over_parts(self, body, total):
    with jax.named_scope(PARTS):
      return jax.lax.fori_loop(0, -(-self.total // self.size), lambda i, t: body(Part(self, i * self.size), t), total)


class Part:
  """Pairs start .. start + size of those that arrived. row_S: of the rows; expert_S, gate_Sx1."""

  def __init__(self, arrived: Arrived, start):
    pair_S = jax.lax.dynamic_slice_in_dim(arrived.order, start, arrived.size)
    self.row_S, self.gate_Sx1 = pair_S // arrived.picks_CxK.shape[1], arrived.gate[pair_S][:, None]
    self.expert_S = jnp.where(start + jnp.arange(arrived.size) < arrived.total, arrived.pick[pair_S], arrived.nobody)
    place = arrived.place_CxK - start
    self.place_CxK = jnp.where((place >= 0) & (place < arrived.size), place, arrived.size)

  def by_pick(self, pairs_S):
    """[S] -> [C, K], 0 where a pick has no pair here."""
    return pairs_S.at[self.place_CxK].get(mode='fill', fill_value=0)

  def summed(self, pairs_SxD):
    """[S, D] -> [C, D], the sum over a row's pairs. They stand side by side, so each place adds up those that follow it
    in float32, and a row takes its first: gathering [C, K, D] would move several times as much."""
    top_k, size = self.place_CxK.shape[1], len(self.row_S)
    rows, pairs = (jnp.pad(a, ((0, top_k - 1), *[(0, 0)] * (a.ndim - 1))) for a in (self.row_S, pairs_SxD))
    total = sum(jnp.where((rows[j:j + size] == self.row_S)[:, None], pairs[j:j + size].astype(jnp.float32), 0)
                for j in range(top_k))
    return total.astype(pairs_SxD.dtype).at[self.place_CxK.min(1)].get(mode='fill', fill_value=0)


def buffer(even: int, devices: int) -> int:
  """Places for what is `even` on average, and never more than all devices together have."""
  return -(-max(int(even * BUFFER), min(even * devices, LEAST_BUFFER)) // 8) * 8


def zero_gradients(weights):
  return tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)


def added(total, more):
  return tuple(a + b.astype(a.dtype) for a, b in zip(total, more, strict=True))


def group_of(picked, num_experts: int, layout: Layout, local_experts) -> Group:
  """Rows are tokens where that sends fewer."""
  kind = DeviceGroup if most_devices(layout, picked.shape[1]) < picked.shape[1] else Group
  return kind(picked, num_experts, layout, local_experts)


def sharded(layout: Layout, local_experts, x_NxTxD, picked_NxTxK, gate_NxTxK, gate_ExDxF, up_ExDxF, down_ExFxD):
  """(sum_k gate[k] SwiGLU_{picked[k]}(x) [N, T, D], float32 [E] pairs an expert received).

  local_experts: (x [n, D], picked [n, K], gate [n, K], three weights) -> [n, D] on one device, differentiable,
  hashable.
  N must divide over the batch's mesh axes, E over the experts'. T is padded to the places' here.
  """
  num_experts, length = gate_ExDxF.shape[0], x_NxTxD.shape[1]
  gate_NxTxK = gate_NxTxK.astype(x_NxTxD.dtype)
  if pad := -length % layout.size(layout.rules['places']):
    fill = ((0, 0), (0, pad), (0, 0))
    x_NxTxD, gate_NxTxK = jnp.pad(x_NxTxD, fill), jnp.pad(gate_NxTxK, fill)
    picked_NxTxK = jnp.pad(picked_NxTxK, fill, constant_values=num_experts)
  y, load = _over_mesh(layout, local_experts, picked_NxTxK, x_NxTxD, gate_NxTxK, gate_ExDxF, up_ExDxF, down_ExFxD)
  return y[:, :length], load


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_mesh(layout, local_experts, picked, x, gate, *weights):
  return _forward(layout, local_experts, picked, x, gate, *weights)[0]


def _specs(layout: Layout):
  """Of tokens and of the three weights."""
  return layout.spec('batch', 'places', None), (layout.spec('experts', 'expert_rows', 'expert_columns'),) * 3


def _forward(layout, local_experts, picked, x, gate, *weights):
  num_experts = weights[0].shape[0]
  tokens, placed = _specs(layout)

  def body(picked, x, gate, *weights):
    shape, weights = x.shape, _whole(layout, weights)
    picked, x, gate = (a.reshape(-1, a.shape[-1]) for a in (picked, x, gate))
    if layout.size(EXPERT_AXES) == 1:
      y = local_experts(x, picked, gate, *weights)
    else:
      y = group_of(picked, num_experts, layout, local_experts).forward(x, gate, *weights)
    load = jnp.bincount(picked.reshape(-1), length=num_experts + 1)[:-1]
    return y.reshape(shape), jax.lax.psum(load.astype(jnp.float32), layout.mesh.axis_names)
  run = jax.shard_map(body, mesh=layout.mesh, in_specs=(tokens, tokens, tokens, *placed), out_specs=(tokens, P()),
                      check_vma=False)
  return run(picked, x, gate, *weights), (picked, x, gate, *weights)


def _backward(layout, local_experts, saved, cotangent):
  num_experts, (tokens, placed) = saved[3].shape[0], _specs(layout)

  def body(dy, picked, x, gate, *own_weights):
    (shape, gate_shape), weights = (x.shape, gate.shape), _whole(layout, own_weights)
    dy, picked, x, gate = (a.reshape(-1, a.shape[-1]) for a in (dy, picked, x, gate))
    if layout.size(EXPERT_AXES) == 1:
      _, vjp = jax.vjp(lambda x, gate, *w: local_experts(x, picked, gate, *w), x, gate, *weights)
      dx, dgate, *dweights = vjp(dy)
    else:
      dx, dgate, dweights = group_of(picked, num_experts, layout, local_experts).backward(dy, x, gate, *weights)
    dweights = (_own(layout, d.astype(w.dtype)) for d, w in zip(dweights, weights, strict=True))
    return dx.reshape(shape), dgate.reshape(gate_shape), *dweights
  run = jax.shard_map(body, mesh=layout.mesh, in_specs=(tokens, tokens, tokens, tokens, *placed),
                      out_specs=(tokens, tokens, *placed), check_vma=False)
  return None, *run(cotangent[0], *saved)


_over_mesh.defvjp(_forward, _backward)


def _whole(layout, weights):
  """All rows of a layer's experts of this device."""
  axes = layout.rules['expert_rows']
  return tuple(jax.lax.all_gather(w, axes, axis=1, tiled=True) for w in weights) if axes else weights


def _own(layout, gradient):
  """This device's rows of a gradient, summed over all devices that share the weight."""
  axes = layout.rules['expert_rows']
  if axes:
    gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=1, tiled=True)
  copies = tuple(a for a in layout.mesh.axis_names if a not in (*axes, *EXPERT_AXES))
  return jax.lax.psum(gradient, copies)
