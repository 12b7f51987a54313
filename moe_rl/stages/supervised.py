"""What stages on packed rows share: the jitted update over microbatches, and the loop around it."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from moe_rl.models.moe import move_bias, router_metrics
from moe_rl.runtime import hosts
from moe_rl.runtime.run import CompileCounter, Run
from moe_rl.runtime.state import TrainState
from moe_rl.stages.spent import costs_of, training_flops


def make_update(loss, shares, optimizer: optax.GradientTransformation, bias_rate: float):
  """(state, rows [M, R, T], *frozen) -> (state, metrics): one optimizer step over M microbatches of R rows.

  shares: (rows of the whole step) -> what a microbatch's sums are divided by, so that microbatches add up; loss:
  (params, router, rows [R, T], shares, *frozen) -> (loss, (metrics, load_LxE)), all of them sums in that sense.
  frozen: arrays that are read and neither trained nor kept in the state.
  """
  def update(state: TrainState, rows: dict, *frozen):
    share = shares(rows)
    value_and_grad = jax.value_and_grad(lambda p, r: loss(p, state.router, r, share, *frozen), has_aux=True)

    def microbatch(total, r):
      (_, aux), grads = value_and_grad(state.params, r)
      return jax.tree.map(jnp.add, total, (grads, aux)), None
    shapes = jax.eval_shape(lambda r: (lambda v, g: (g, v[1]))(*value_and_grad(state.params, r)),
                            jax.tree.map(lambda a: a[0], rows))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, (metrics, load)), _ = jax.lax.scan(microbatch, zeros, rows)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    router = move_bias(state.router, load, bias_rate)
    metrics |= {'grad_norm': optax.global_norm(grads), **router_metrics(router, load)}
    state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                          router=router, opt_state=opt_state)
    return state, metrics
  return update


@dataclasses.dataclass(frozen=True)
class Trained:
  """Where a loop ended: step, state, seconds (of all its processes), metrics of the first and of the last step, and
  what it cost (`Costs.record`)."""

  step: int
  state: TrainState
  seconds: float
  first: dict[str, float]
  last: dict[str, float]
  costs: dict


def train(config, sizes, folder: Run, stage, data, steps: int, *, frozen=tuple, given: str = '',
          flops=None) -> Trained:
  """Steps until `steps` are done or a stop is requested, from wherever the folder is; saves at the end and between.

  sizes: the section with microbatch_rows and row_tokens, as they are used; stage: has `initial_state`, `abstract` and
  `update`; data: iterator of this host's stacked rows that can say where it is; frozen: () -> the update's frozen
  arrays, called once nothing else can refuse; given: tells the data apart from other data, where the config alone does
  not; flops: (tokens, context) -> useful FLOPs of training on them, by default those of the stage's model.
  Raises ValueError where a run would go on with other data, FloatingPointError at a loss that is not finite.
  """
  folder.catch_signals()
  done, spent, first, metrics, costs = 0, 0.0, {}, {}, costs_of(config)
  flops = flops or functools.partial(training_flops, stage.model)
  state = None if folder.begun else stage.initial_state()  # before the folder is written to, as it may refuse
  restored = folder.restore(stage.abstract)
  if restored:
    done, state, host = restored
    if host['given'] != given:
      raise ValueError(f'--workdir {folder.path}: what the config names was {host["given"]} when this run began and is '
                       f'{given} now: give it the same files again, or use another workdir')
    data.set_state(host['data'])
    spent, first, metrics = host['seconds'], host['first'], host['metrics']
    costs = costs_of(config, host['costs'])
  frozen = frozen()

  def host_record() -> dict:
    return {'data': data.get_state(), 'seconds': spent + time.time() - started, 'given': given, 'first': first,
            'metrics': metrics, 'costs': costs.record()}
  compiles, started, last = CompileCounter(), time.time(), time.time()
  bar = tqdm.tqdm(total=steps, initial=done, unit='step', disable=not folder.main, mininterval=1)
  step, every = done, config.checkpoint.every
  while step < steps and not folder.stop_requested:
    rows = {k: v.reshape(-1, sizes.microbatch_rows // hosts.count(), sizes.row_tokens) for k, v in next(data).items()}
    real = rows['segments'] > 0  # on this host, whose rows stand for the others'
    own_tokens = int(real.sum())
    tokens, context = own_tokens * hosts.count(), rows['positions'][real].sum() / max(own_tokens, 1)
    rows = hosts.spread(rows, like=state, leading=1)
    state, metrics = stage.update(state, rows, *frozen)
    step += 1
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    first = first or metrics
    if not np.isfinite(metrics['loss']):
      raise FloatingPointError(f'step {step}: the loss is {metrics["loss"]}; the newest checkpoint in {folder.path} is '
                               'whole. Lower optim.lr and start again in another workdir')
    now = time.time()
    costs.add('update', flops(tokens, context), now - last, tokens)
    rate, last = rows['ids'].size / (now - last), now
    shared, own = costs.scalars()
    folder.log(step, metrics | shared, {'tokens_per_second': rate, 'compiles': compiles.count, **own})
    bar.update()
    bar.set_postfix_str(f'loss {metrics["loss"]:.3f} {rate:,.0f} tok/s')
    if every and step % every == 0 and step < steps:
      folder.save(step, state, host_record())
  if step > done:
    folder.save(step, state, host_record())
  bar.close()
  return Trained(step, state, spent + time.time() - started, first, metrics, costs.record())
