"""The policy update: one jitted function, state in, state out; and the trainer's log-probs before the first one."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from moe_rl.models.heads import token_logprobs
from moe_rl.models.moe import move_bias, router_metrics
from moe_rl.models.transformer import Transformer, for_compute, whole_vocabulary
from moe_rl.rl import grpo
from moe_rl.rl.batch import PackedBatch
from moe_rl.rl.objectives import chosen
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.programs import MICROBATCHES
from moe_rl.runtime.state import TrainState


def score(net: Transformer, variables: dict, batch: PackedBatch, sampling: dict):
  """Log-probs and entropies (nats, float32 [R, T], 0 at t = 0) of a microbatch's tokens, and expert loads [L, E].

  The same module, temperature and support as the sampler's; this is the trainer's side of the comparison. Where the
  batch has the sampler's picks, its tokens go to those experts.
  """
  variables = {**variables, 'params': whole_vocabulary(net, for_compute(net.config, variables['params']))}
  if batch.picks is not None:
    variables['picks'] = {'moe': {'ff': {'experts': jnp.moveaxis(batch.picks, 2, 0)}}}
  out = net.apply(variables, batch.ids, batch.positions, batch.segments)
  logp, entropy = token_logprobs(lambda h: net.apply(variables, h, method=net.logits),
                                 out.hidden_NxTxD[:, :-1], batch.ids[:, 1:], layout=net.layout, **sampling)
  load = out.router.load_E if out.router is not None else jnp.zeros((0, 0))
  return *(jnp.pad(x, ((0, 0), (1, 0))) for x in (logp, entropy)), load


def make_scoring(net: Transformer, c, sampling: dict):
  """(variables, batch, microbatches in use) -> (batch, metrics): the trainer's log-probs in place of the sampler's.

  variables: the weights that sampled; so this comes before the first update on a rollout. The importance weights
  between the two, as c (config.rl) names them, go with the batch. Metrics: the gap between the two as
  `make_grpo_update` has it; importance: the mean weight of a token; importance_cut: the share of tokens whose weight
  was cut or masked.
  """
  def scoring(variables: dict, batch: PackedBatch, microbatches: jax.Array):
    def one(i, logp):
      own, _, _ = score(net, variables, jax.tree.map(lambda x: x[i], batch), sampling)
      return logp.at[i].set(own)
    with jax.named_scope(MICROBATCHES):
      logp = jax.lax.fori_loop(0, microbatches, one, jnp.zeros_like(batch.logp))
    answer = batch.weight > 0
    logp = jnp.where(answer, logp, 0.0)
    tokens = jnp.maximum(answer.sum(), 1)
    gap = jnp.abs(logp - batch.logp)  # both are 0 elsewhere
    metrics = {'sampler_gap': gap.max(), 'sampler_gap_mean': gap.sum() / tokens}
    importance = None
    if c.importance != 'none':
      rows = [x.reshape(-1, x.shape[-1]) for x in (logp, batch.logp, answer, batch.segments)]
      importance = grpo.importance_weights(*rows, c.importance, *c.importance_range).reshape(logp.shape)
      plain = jnp.exp(grpo.log_ratio(logp, batch.logp))
      metrics |= {'importance': (importance * answer).sum() / tokens,
                  'importance_cut': ((importance != plain) & answer).sum() / tokens}
    return batch.replace(logp=logp, importance=importance), metrics
  return scoring


def make_grpo_update(net: Transformer, optimizer: optax.GradientTransformation, c, sampling: dict, placed=None,
                     alone: Mesh | None = None):
  """(state, batch, microbatches in use) -> (state, metrics): one optimizer step; c is config.rl.

  Loss = sum_t weight_t (policy_t + kl_weight KL_t), both as the objective has them. Only microbatches in use are
  computed, by a loop whose length is data, so that shapes never change. sampling: temperature, top_k, top_p of the
  rollout. Replayed picks are the policy's alone: the reference goes its own ways, as that is the policy it stands for.
  placed: shardings of the weights, to which a reference in host memory is brought for each of its forward passes.
  alone: a mesh of devices that are `mesh.alone`, each of which then sums over its own rows with a net that has no
  layout; what they found is added once, at the end.
  The router bias (rate c.bias_rate, 0: frozen) moves by the loads seen here, replayed ones included; where picks are
  replayed it acts in the sampler only.
  """
  objective = chosen(c)

  def loss_and_sums(params, router, reference, batch: PackedBatch):
    logp, entropy, load = score(net, {'params': params, 'router': router}, batch, sampling)
    reference_logp = None
    if objective.kl_weight:
      weights = jax.device_put(reference, placed) if c.reference_memory == 'host' else reference
      reference_logp, _, _ = score(net, {'params': weights, 'router': router}, batch.replace(picks=None), sampling)
    loss, sums = grpo.loss(objective, logp, reference_logp, batch)
    token = (batch.weight > 0).astype(jnp.float32)
    gap = jnp.abs(logp - batch.logp) * token
    sums |= {
      'tokens': token.sum(), 'entropy': (entropy * token).sum(),
      'ratio': (jnp.exp(grpo.log_ratio(logp, batch.logp)) * token).sum(), 'gap': gap.sum()}
    return loss, (sums | {'loss': loss}, {'gap': gap.max()}, load)

  def gradients(params, router, reference, batch: PackedBatch, microbatches):
    """Gradients, sums, peaks and loads over the microbatches in use."""
    grad = jax.value_and_grad(loss_and_sums, has_aux=True)

    def one(i):
      (_, aux), grads = grad(params, router, reference, jax.tree.map(lambda x: x[i], batch))
      return grads, *aux

    def add(i, total):
      grads, sums, peaks, load = one(i)
      return jax.tree.map(jnp.add, total[0], grads), jax.tree.map(jnp.add, total[1], sums), jax.tree.map(
        jnp.maximum, total[2], peaks), total[3] + load
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
    with jax.named_scope(MICROBATCHES):
      return jax.lax.fori_loop(0, microbatches, add, zeros)

  if alone:
    gradients = over_devices(alone, gradients)

  def update(state: TrainState, batch: PackedBatch, microbatches: jax.Array):
    grads, sums, peaks, load = gradients(state.params, state.router, state.reference, batch, microbatches)
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


def over_devices(mesh: Mesh, gradients):
  """`gradients` of `make_grpo_update` by every device over its own rows, then added up."""
  def found(*arguments):
    grads, sums, peaks, load = gradients(*arguments)
    grads, sums, load = jax.lax.psum((grads, sums, load), mesh.axis_names)
    return grads, sums, jax.lax.pmax(peaks, mesh.axis_names), load
  whole, by_microbatch = PartitionSpec(), meshes.rows(mesh, leading=1).spec
  return jax.shard_map(found, mesh=mesh, in_specs=(whole, whole, whole, by_microbatch, whole), out_specs=whole,
                       check_vma=False)
