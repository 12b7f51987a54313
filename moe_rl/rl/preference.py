"""The loss of a reward model: pairs by Bradley and Terry, single answers by a logistic loss; and the rows they lie in.

For a pair -log sigmoid(r_better - r_worse), for one answer -log sigmoid(±r), r being the scalar head's number at the
answer's last token (DeepSeek-R1, arXiv:2501.12948v2, supplement). Both are softplus(-margin).
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_rl.data.packing import place
from moe_rl.data.preferences import Example
from moe_rl.models.moe import router_metrics
from moe_rl.models.transformer import Transformer, for_compute
from moe_rl.runtime.state import TrainState

ALONE = -1


@flax.struct.dataclass
class PreferenceBatch:
  """M microbatches of R rows of T tokens, [M, R, T] each; both answers of a pair lie in one row.

  ids, positions, segments: int32 as the model takes them. Where an answer is judged, which is the last token of a
  better or of a single one: sign: float32, 1, or -1 for a bad single one, 0 on all other tokens; other: int32, the
  place in the row of the worse one's last token, `ALONE` where there is none.
  """

  ids: jax.Array
  positions: jax.Array
  segments: jax.Array
  sign: jax.Array
  other: jax.Array


def pack(examples: list[Example], *, row_tokens: int, microbatch_rows: int, count: int) -> tuple[PreferenceBatch, int]:
  """(numpy PreferenceBatch with room for `count` examples, microbatches in use): longest first, into the first row
  with room. Raises ValueError for an example longer than a row, or more than `count`."""
  tokens = np.array([example.tokens for example in examples])
  if tokens.max() > row_tokens or len(examples) > count:
    raise ValueError(f'{len(examples)} examples of up to {tokens.max()} tokens do not fit {count} rows of {row_tokens}')
  row_of, start_of, rows = place(tokens, row_tokens)
  microbatches = -(-count // microbatch_rows)
  shape = (microbatches * microbatch_rows, row_tokens)
  out = {name: np.zeros(shape, np.int32) for name in ('ids', 'positions', 'segments')}
  out |= {'sign': np.zeros(shape, np.float32), 'other': np.full(shape, ALONE, np.int32)}
  segment = np.zeros(shape[0], np.int32)
  for example, row, start in zip(examples, row_of, start_of, strict=True):
    ends = []
    for ids in example.sequences:
      segment[row] += 1
      cells = slice(start, start + len(ids))
      out['ids'][row, cells], out['positions'][row, cells] = ids, np.arange(len(ids))
      out['segments'][row, cells] = segment[row]
      start += len(ids)
      ends.append(start - 1)
    out['sign'][row, ends[0]] = 1 if example.good else -1
    out['other'][row, ends[0]] = ends[1] if ends[1:] else ALONE
  packed = {k: v.reshape(microbatches, microbatch_rows, row_tokens) for k, v in out.items()}
  return PreferenceBatch(**packed), -(-rows // microbatch_rows)


def scores(net: Transformer, variables: dict, ids, positions, segments):
  """(the scalar head's number at every token, float32 [R, T], expert loads [L, E])."""
  variables = {**variables, 'params': for_compute(net.config, variables['params'])}
  out = net.apply(variables, ids, positions, segments)
  load = out.router.load_E if out.router is not None else jnp.zeros((0, 0))
  return net.apply(variables, out.hidden_NxTxD, method=net.score), load


def margins(score_RxT: jax.Array, batch: PreferenceBatch) -> jax.Array:
  """float32 [R, T]: by how much an example is judged as it should be, where it is judged: r_better - r_worse, or ±r.

  batch: of one microbatch. Positive is right. 0 on all other tokens.
  """
  other = jnp.take_along_axis(score_RxT, jnp.maximum(batch.other, 0), axis=1)
  return batch.sign * (score_RxT - jnp.where(batch.other != ALONE, other, 0.0))


def right(margin):
  """1 where an example is judged as it should be, 0 where not, a half for a tie: of jax or numpy alike."""
  return (margin > 0) + 0.5 * (margin == 0)


def make_preference_update(net: Transformer, optimizer: optax.GradientTransformation, examples: int):
  """(state, batch, microbatches in use) -> (state, metrics): one optimizer step on the mean over `examples`.

  Metrics: loss in nats an example, accuracy (share judged right), margin, score (mean of the judged ones), grad_norm;
  router as everywhere. The router's bias is frozen, as in RL.
  """
  def loss_and_sums(params, router, batch: PreferenceBatch):
    score, load = scores(net, {'params': params, 'router': router}, batch.ids, batch.positions, batch.segments)
    margin, weight = margins(score, batch), jnp.abs(batch.sign) / examples
    loss = (weight * jax.nn.softplus(-margin)).sum()
    return loss, ({'loss': loss, 'accuracy': (weight * right(margin)).sum(), 'margin': (weight * margin).sum(),
                   'score': (weight * score).sum()}, load)

  def update(state: TrainState, batch: PreferenceBatch, microbatches: jax.Array):
    grad = jax.value_and_grad(loss_and_sums, has_aux=True)

    def one(i):
      (_, aux), grads = grad(state.params, state.router, jax.tree.map(lambda x: x[i], batch))
      return grads, *aux
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
    grads, sums, load = jax.lax.fori_loop(
      0, microbatches, lambda i, total: jax.tree.map(jnp.add, total, one(i)), zeros)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {**sums, 'grad_norm': optax.global_norm(grads), **router_metrics(state.router, load)}
    return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                         opt_state=opt_state), metrics
  return update


def make_margins(net: Transformer):
  """(variables, batch, microbatches in use) -> margins of them all, float32 [M, R, T], 0 in those not in use."""
  def judge(variables: dict, batch: PreferenceBatch, microbatches: jax.Array):
    def one(i, out):
      part = jax.tree.map(lambda x: x[i], batch)
      score, _ = scores(net, variables, part.ids, part.positions, part.segments)
      return out.at[i].set(margins(score, part))
    return jax.lax.fori_loop(0, microbatches, one, jnp.zeros(batch.sign.shape, jnp.float32))
  return judge
