"""From hidden states to log-probabilities, in chunks, so that no [N, T, V] array exists."""

import jax
import jax.numpy as jnp

from moe_rl.runtime.mesh import Layout

CHUNK_TOKENS = 2048  # float32 logits of one chunk: 2048 x 129,280 x 4 B = 1.06 GB at V3's vocabulary
DIVERGENCES = ('forward', 'reverse')


def support_mask(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """bool [..., V]: the tokens that top-k, then top-p leave; logits are already divided by the temperature.

  top_k 0 and top_p 1 leave all. Top-p keeps the smallest set of likeliest tokens whose mass, among what top-k left,
  reaches top_p; ties with the last one kept stay too, so that the set does not depend on an order among equals.
  """
  if not top_k and top_p >= 1:
    return jnp.ones(logits.shape, bool)
  descending = -jnp.sort(-logits, axis=-1)
  if top_k:
    keep = jnp.arange(logits.shape[-1]) < top_k
    descending = jnp.where(keep, descending, -jnp.inf)
  p = jax.nn.softmax(descending, axis=-1)
  before = jnp.cumsum(p, axis=-1) - p
  kept = (before < top_p) & jnp.isfinite(descending)
  least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
  return logits >= least


def distribution(logits: jax.Array, temperature: float, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
  """float32 log-probs [..., V] of the distribution that is sampled from: renormalised over its support."""
  logits = logits.astype(jnp.float32) / temperature
  if top_k or top_p < 1:
    logits = jnp.where(support_mask(logits, top_k, top_p), logits, -jnp.inf)
  return jax.nn.log_softmax(logits, axis=-1)


def token_logprobs(logits_of, hidden_NxTxD, targets_NxT, temperature=1.0, top_k=0, top_p=1.0, chunk=CHUNK_TOKENS,
                   layout: Layout | None = None):
  """(log-prob of each target in nats, entropy in nats), float32 [N, T], under the sampled distribution.

  logits_of: [M, D] -> float32 [M, V]. A target outside the support (possible through rounding at its edge only)
  gets its log-prob as though it were in. In chunks as `by_chunks` has them.
  """
  def some(hidden, targets):
    logits = _place(layout, logits_of(hidden), 'batch', 'vocab') / temperature
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    if top_k or top_p < 1:
      support = support_mask(jax.lax.stop_gradient(logits), top_k, top_p) | (
        jnp.arange(logits.shape[-1]) == targets[:, None])
      logits = jnp.where(support, logits, -1e30)  # finite, so that p * log p of the masked is 0 and not NaN
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    p = jax.nn.softmax(logits, axis=-1)
    return own[:, 0] - normaliser, normaliser - (p * logits).sum(-1)
  return by_chunks(some, (hidden_NxTxD, targets_NxT), chunk, layout)


def taught(logits_of, hidden_NxTxD, targets_NxT, teacher=None, divergence='forward', chunk=CHUNK_TOKENS,
           layout: Layout | None = None):
  """(log-prob of each target in nats, 1 where the target is the likeliest token, divergence in nats): float32 [N, T].

  teacher: (its logits_of, its hidden [N, T, D']), or None: then the divergence is 0. divergence: 'forward',
  KL(teacher || student) = sum_v q_v (log q_v - log p_v) with q the teacher's probabilities over the whole vocabulary,
  or 'reverse', KL(student || teacher); both at temperature 1. No gradient reaches the teacher. In chunks, so neither
  model's [N, T, V] array exists.
  """
  def some(hidden, targets, teacher_hidden=None):
    logits = _place(layout, logits_of(hidden), 'batch', 'vocab')
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    right = (own[:, 0] >= jax.lax.stop_gradient(logits).max(-1)).astype(jnp.float32)
    if teacher is None:
      logp = own[:, 0] - jax.nn.logsumexp(logits, axis=-1)
      return logp, right, jnp.zeros_like(logp)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    log_q = jax.nn.log_softmax(_place(layout, teacher[0](teacher_hidden), 'batch', 'vocab'), axis=-1)
    log_q = jax.lax.stop_gradient(log_q)
    apart = jnp.exp(log_q) * (log_q - log_p) if divergence == 'forward' else jnp.exp(log_p) * (log_p - log_q)
    return jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0], right, apart.sum(-1)
  arrays = (hidden_NxTxD, targets_NxT) if teacher is None else (hidden_NxTxD, targets_NxT, teacher[1])
  return by_chunks(some, arrays, chunk, layout)


def by_chunks(function, arrays, chunk: int = CHUNK_TOKENS, layout: Layout | None = None):
  """A function of tokens, [M, …] arrays -> several [M], over [N, T, …] arrays: several [N, T].

  What it computes is computed again for the backward pass, chunk by chunk; a chunk has the same places of every row,
  about `chunk` tokens a device.
  """
  @jax.checkpoint
  def some(parts):
    flat = [_place(layout, x, 'batch', *[None] * (x.ndim - 1)).reshape(-1, *x.shape[2:]) for x in parts]
    return tuple(x.reshape(parts[0].shape[:2]) for x in function(*flat))

  rows, length = arrays[0].shape[:2]
  places = min(length, max(1, chunk * (layout.size(layout.rules['batch']) if layout else 1) // rows))
  chunks = -(-length // places)
  if chunks == 1:
    return some(arrays)

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, chunks * places - length), *[(0, 0)] * (x.ndim - 2)))
    x = x.reshape(rows, chunks, places, *x.shape[2:]).swapaxes(0, 1)
    return _place(layout, x, None, 'batch', *[None] * (x.ndim - 2))
  out = jax.lax.map(some, tuple(map(cut, arrays)))
  return tuple(x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in out)


def _place(layout: Layout | None, x: jax.Array, *logical: str | None) -> jax.Array:
  return layout.constrain(x, *logical) if layout else x
