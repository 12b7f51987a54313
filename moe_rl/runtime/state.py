"""The training state: one pytree, born sharded, and the optimizer."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from moe_rl.models import transformer
from moe_rl.models.config import ModelConfig
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.keys import key_for


@flax.struct.dataclass
class TrainState:
  """All that a run is, besides its place in the data.

  step: int32 scalar, optimizer updates done; params: the trained weights; router: selection biases; opt_state: optax;
  reference: the weights that the KL penalty is measured from, {} where there is none.
  """

  step: jax.Array
  params: dict
  router: dict
  opt_state: optax.OptState
  reference: dict

  @property
  def variables(self) -> dict:
    """What `Transformer.apply` takes."""
    return {'params': self.params, 'router': self.router}


def make_optimizer(config, updates: int) -> optax.GradientTransformation:
  """AdamW on a linear warm-up and a cosine from optim.lr to optim.final_lr over `updates` updates."""
  o = config.optim
  decay = max(updates - o.warmup_steps, 1)
  schedule = optax.cosine_decay_schedule(o.lr, decay, alpha=o.final_lr / o.lr)
  if o.warmup_steps:
    schedule = optax.join_schedules([optax.linear_schedule(0.0, o.lr, o.warmup_steps), schedule], [o.warmup_steps])

  def matrices(params):  # norms' scales and the biases of queries, keys and values are not decayed
    def matrix(path, _):
      return not any(word in jax.tree_util.keystr(path) for word in ('scale', 'bias'))
    return jax.tree_util.tree_map_with_path(matrix, params)
  clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
  adamw = optax.chain(kept_in(o.moment_dtype, optax.scale_by_adam(o.beta1, o.beta2)),
                      optax.add_decayed_weights(o.weight_decay, matrices), optax.scale_by_learning_rate(schedule))
  return optax.chain(clip, adamw)


def kept_in(dtype: str, transform: optax.GradientTransformation) -> optax.GradientTransformation:
  """The transformation with its moments stored in `dtype` between updates, computed in that of the parameters.

  DeepSeek-V3 (arXiv:2412.19437, sec. 3.3.3) keeps both in bfloat16.
  """
  def stored(state):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

  def update(grads, state, params=None):
    full = state._replace(**{k: jax.tree.map(lambda m, g: m.astype(g.dtype), getattr(state, k), grads)
                             for k in ('mu', 'nu')})
    grads, full = transform.update(grads, full, params)
    return grads, stored(full)
  return optax.GradientTransformation(lambda params: stored(transform.init(params)), update)


def make_state(model: ModelConfig, optimizer, key: jax.Array, reference: bool) -> TrainState:
  """A fresh state, parameters boxed with their logical axes (`abstract_state` and `make_init` unbox it)."""
  variables = transformer.init(model, key)
  params = variables['params']
  return TrainState(jnp.zeros((), jnp.int32), params, variables.get('router', {}), optimizer.init(params),
                    jax.tree.map(jnp.copy, params) if reference else {})


def abstract_state(model: ModelConfig, optimizer, mesh, reference: bool, reference_memory: str = 'device'):
  """(state of ShapeDtypeStruct, state of NamedSharding): what a program over the state is compiled from.

  reference_memory: one of `mesh.MEMORIES`. Raises ValueError where the devices' host has none that they reach.
  """
  boxed = jax.eval_shape(lambda: make_state(model, optimizer, jax.random.key(0), reference))
  shardings = meshes.shardings(boxed, mesh)
  if reference_memory == 'host':
    shardings = shardings.replace(reference=meshes.in_host_memory(shardings.reference))
  return meshes.abstract(nn.unbox(boxed), shardings), shardings


def compute_variables(model: ModelConfig, mesh, rules: dict[str, tuple[str, ...]]) -> dict:
  """{'params', 'router'} of ShapeDtypeStruct of a model that is only read: compute_dtype, placed by a table."""
  boxed = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
  shardings = meshes.shardings(boxed, mesh, rules)
  cast = jax.eval_shape(lambda v: v | {'params': transformer.for_compute(model, v['params'])}, nn.unbox(boxed))
  return meshes.abstract({'params': cast['params'], 'router': cast.get('router', {})},
                         {'params': shardings['params'], 'router': shardings.get('router', {})})


def sampler_variables(model: ModelConfig, mesh) -> dict:
  """The variables as the sampler reads them, placed by the sampling table."""
  return compute_variables(model, mesh, meshes.SAMPLING)


def make_relayout(model: ModelConfig, mesh):
  """(variables as trained) -> those of `sampler_variables`, jitted: the way of new weights to the sampler."""
  def relayout(variables):
    return variables | {'params': transformer.for_compute(model, variables['params'])}
  return jax.jit(relayout, out_shardings=jax.tree.map(lambda x: x.sharding, sampler_variables(model, mesh)))


def make_init(model: ModelConfig, optimizer, shardings: TrainState, seed: int, reference: bool):
  """() -> the random initial state, jitted: each device computes its own shard only."""
  def init():
    return nn.unbox(make_state(model, optimizer, key_for(seed, 'init'), reference))
  return jax.jit(init, out_shardings=shardings)


def make_adopt(optimizer, shardings: TrainState, reference: bool):
  """(params) -> (step 0, fresh optimizer state, reference or {}): what a state has besides given weights, jitted."""
  def adopt(params):
    return jnp.zeros((), jnp.int32), optimizer.init(params), jax.tree.map(jnp.copy, params) if reference else {}
  return jax.jit(adopt, in_shardings=(shardings.params,),
                 out_shardings=(shardings.step, shardings.opt_state, shardings.reference))


def copied(tree, like):
  """The arrays again, in memory of their own, of the kind that those of `like` have, which are cut alike. Compiles
  nothing, at whatever step it comes: shard by shard, as jax compiles the copy of an array on several devices."""
  def copy(x, y):
    kind = y.sharding.memory_kind
    shards = [jax.device_put(s.data, SingleDeviceSharding(s.device, memory_kind=kind), may_alias=False)
              for s in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, y.sharding, shards)
  return jax.tree.map(copy, tree, like)
