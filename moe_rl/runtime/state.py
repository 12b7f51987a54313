"""The training state: one pytree, born sharded, and the optimizer."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

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

  def matrices(params):  # norms' scales are not decayed
    return jax.tree_util.tree_map_with_path(lambda path, _: 'scale' not in jax.tree_util.keystr(path), params)
  clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
  return optax.chain(clip, optax.adamw(schedule, o.beta1, o.beta2, weight_decay=o.weight_decay, mask=matrices))


def make_state(model: ModelConfig, optimizer, key: jax.Array, reference: bool) -> TrainState:
  """A fresh state, parameters boxed with their logical axes (`abstract_state` and `born` unbox it)."""
  variables = transformer.init(model, key)
  params = variables['params']
  return TrainState(jnp.zeros((), jnp.int32), params, variables.get('router', {}), optimizer.init(params),
                    jax.tree.map(jnp.copy, params) if reference else {})


def abstract_state(model: ModelConfig, optimizer, mesh, reference: bool):
  """(state of ShapeDtypeStruct, state of NamedSharding): what a program over the state is compiled from."""
  boxed = jax.eval_shape(lambda: make_state(model, optimizer, jax.random.key(0), reference))
  shardings = meshes.shardings(boxed, mesh)
  shapes = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings)
  return shapes, shardings


def make_init(model: ModelConfig, optimizer, mesh, seed: int, reference: bool):
  """() -> the random initial state, jitted: each device computes its own shard only."""
  _, shardings = abstract_state(model, optimizer, mesh, reference)

  def init():
    return nn.unbox(make_state(model, optimizer, key_for(seed, 'init'), reference))
  return jax.jit(init, out_shardings=shardings)


def born(model: ModelConfig, optimizer, mesh, seed: int, reference: bool) -> TrainState:
  """The random initial state."""
  return make_init(model, optimizer, mesh, seed, reference)()


def with_weights(state: TrainState, variables: dict) -> TrainState:
  """The state with these weights (numpy trees) in place of its own, also as reference where it keeps one.

  Raises ValueError as `check_weights` does.
  """
  check_weights(state, variables)
  params = _placed(variables['params'], state.params)
  router = _placed(variables.get('router', {}), state.router)
  reference = copied(params) if state.reference else {}
  return state.replace(params=params, router=router, reference=reference)


def copied(tree):
  """The arrays again, in memory of their own and placed alike. Compiles nothing, at whatever step it comes."""
  return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), tree)


def check_weights(state: TrainState, variables: dict):
  """Raises ValueError naming the first weights that are missing, superfluous or of another shape than in `state`, which
  may be abstract."""
  for where, wanted in (('params', state.params), ('router', state.router)):
    given, wanted = _flat(variables.get(where, {})), _flat(wanted)
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or extra:
      raise ValueError(f'{where}: weights do not fit config.model: missing {missing[:3]}, superfluous {extra[:3]}')
    for name, leaf in wanted.items():
      if given[name].shape != leaf.shape:
        raise ValueError(f'{where}/{name}: shape {given[name].shape} in the file, {leaf.shape} by config.model')


def _placed(given, wanted):
  given = _flat(given)
  out = {name: jax.device_put(given[name].astype(leaf.dtype), leaf.sharding) for name, leaf in _flat(wanted).items()}
  return flax.traverse_util.unflatten_dict(out, sep='/')


def _flat(tree) -> dict:
  return flax.traverse_util.flatten_dict(tree, sep='/')


