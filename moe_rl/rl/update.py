"""The GRPO update: one jitted function, state in, state out."""

import jax
import jax.numpy as jnp
import optax

from moe_rl.models.heads import token_logprobs
from moe_rl.models.moe import move_bias, router_metrics
from moe_rl.models.transformer import Transformer, for_compute, whole_vocabulary
from moe_rl.rl import grpo
from moe_rl.rl.batch import PackedBatch
from moe_rl.runtime.state import TrainState


def score(net: Transformer, variables: dict, batch: PackedBatch, sampling: dict):
  """Log-probs and entropies (nats, float32 [R, T], 0 at t = 0) of a microbatch's tokens, and expert loads [L, E].

  The same module, temperature and support as the sampler's; this is the trainer's side of the comparison.
  """
  variables = variables | {'params': whole_vocabulary(net, for_compute(net.config, variables['params']))}
  out = net.apply(variables, batch.ids, batch.positions, batch.segments)
  logp, entropy = token_logprobs(lambda h: net.apply(variables, h, method=net.logits),
                                 out.hidden_NxTxD[:, :-1], batch.ids[:, 1:], layout=net.layout, **sampling)
  load = out.router.load_E if out.router is not None else jnp.zeros((0, 0))
  return *(jnp.pad(x, ((0, 0), (1, 0))) for x in (logp, entropy)), load


def make_grpo_update(net: Transformer, optimizer: optax.GradientTransformation, c, sampling: dict):
  """(state, batch, microbatches in use) -> (state, metrics): one optimizer step; c is config.rl.

  Loss = sum_t weight_t (policy_t + kl_weight k3_t). Only microbatches in use are computed, by a loop whose length is
  data, so that shapes never change. sampling: temperature, top_k, top_p of the rollout.
  """
  def loss_and_sums(params, state: TrainState, batch: PackedBatch):
    logp, entropy, load = score(net, {'params': params, 'router': state.router}, batch, sampling)
    token = (batch.weight > 0).astype(jnp.float32)
    policy = grpo.policy_loss(logp, batch.logp, batch.advantage, c.clip_low, c.clip_high)
    loss = (batch.weight * policy).sum()
    gap = jnp.abs(logp - batch.logp) * token
    sums = {
      'tokens': token.sum(), 'entropy': (entropy * token).sum(), 'ratio': (jnp.exp(logp - batch.logp) * token).sum(),
      'clipped': (grpo.clipped(logp, batch.logp, batch.advantage, c.clip_low, c.clip_high) * token).sum(),
      'gap': gap.sum()}
    if c.kl_weight:
      reference, _, _ = score(net, {'params': state.reference, 'router': state.router}, batch, sampling)
      kl = grpo.kl_k3(logp, reference)
      loss = loss + c.kl_weight * (batch.weight * kl).sum()
      sums['kl'] = (kl * token).sum()
    return loss, (sums | {'loss': loss}, {'gap': gap.max()}, load)

  def update(state: TrainState, batch: PackedBatch, microbatches: jax.Array):
    grad = jax.value_and_grad(loss_and_sums, has_aux=True)

    def one(i):
      (_, aux), grads = grad(state.params, state, jax.tree.map(lambda x: x[i], batch))
      return grads, *aux

    def add(i, total):
      grads, sums, peaks, load = one(i)
      return jax.tree.map(jnp.add, total[0], grads), jax.tree.map(jnp.add, total[1], sums), jax.tree.map(
        jnp.maximum, total[2], peaks), total[3] + load
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
    grads, sums, peaks, load = jax.lax.fori_loop(0, microbatches, add, zeros)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    router = move_bias(state.router, load, c.bias_rate)
    tokens = jnp.maximum(sums.pop('tokens'), 1)
    loss = sums.pop('loss')
    gap = {'sampler_gap': peaks['gap'], 'sampler_gap_mean': sums.pop('gap') / tokens}
    metrics = {'loss': loss, **{k: v / tokens for k, v in sums.items()}, **gap,
               'grad_norm': optax.global_norm(grads), **router_metrics(router, load)}
    state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                          opt_state=opt_state, router=router)
    return state, metrics
  return update
