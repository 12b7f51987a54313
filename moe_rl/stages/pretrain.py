"""Pre-training: next token, second-next token (MTP), balanced experts. One loop over packed rows."""

import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from moe_rl import config as configs
from moe_rl.data.pipeline import CorpusRows, batches
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.models.config import ModelConfig, own_fields
from moe_rl.models.heads import token_logprobs
from moe_rl.models.moe import move_bias, router_metrics
from moe_rl.models.transformer import Transformer
from moe_rl.models.weights import save_weights
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.programs import Program
from moe_rl.runtime.run import CompileCounter, Run
from moe_rl.runtime.state import TrainState, make_optimizer
from moe_rl.stages.start import Start


def language_loss(model: ModelConfig, params, router, rows, weight, second_weight, c):
  """Sums over a microbatch, already divided by the whole step's counts, so that microbatches add up.

  rows: dict of int32 [N, T]; weight, second_weight: 1 / tokens of the step that have a next, a second-next token in
  their segment. Returns (loss, (metrics, load_LxE)). Loss = CE + mtp_weight CE_2 + balance_weight balance, in nats.
  """
  net, variables = Transformer(model), {'params': params, 'router': router}
  ids, positions, segments = rows['ids'], rows['positions'], rows['segments']
  out = net.apply(variables, ids, positions, segments)

  def cross_entropy(logits_of, hidden, ahead):
    hidden, targets = hidden[:, :-ahead], ids[:, ahead:]
    logp, _ = token_logprobs(logits_of, hidden, targets)
    return -(logp * has_next(segments, ahead)).sum()
  loss = ce = cross_entropy(
    lambda h: net.apply(variables, h, method=net.logits), out.hidden_NxTxD, 1) * weight
  metrics = {'ce': ce}
  if model.mtp_layers:
    hidden = net.apply(variables, out.hidden_NxTxD, ids, positions, segments, method=net.second_hidden)
    metrics['mtp_ce'] = second_weight * cross_entropy(
      lambda h: net.apply(variables, h, method=net.second_logits), hidden, 2)
    loss = loss + c.mtp_weight * metrics['mtp_ce']
  load = jnp.zeros((0, 0))
  if out.router is not None:
    share = ids.shape[0] / c.rows_per_step
    metrics['balance'] = out.router.balance.mean() * share
    loss = loss + c.balance_weight * metrics['balance']
    load = out.router.load_E
  return loss, ({'loss': loss, **metrics}, load)


def has_next(segments, ahead: int):
  """bool [N, T - ahead]: the token `ahead` places on is of the same document."""
  return (segments[:, ahead:] == segments[:, :-ahead]) & (segments[:, ahead:] > 0)


def make_update(model: ModelConfig, optimizer, c):
  """(state, rows [M, R, T]) -> (state, metrics): one optimizer step over M microbatches of R rows."""
  def update(state: TrainState, rows):
    segments = rows['segments'].reshape(-1, rows['segments'].shape[-1])
    weight, second = (1 / jnp.maximum(has_next(segments, a).sum(), 1) for a in (1, 2))
    value_and_grad = jax.value_and_grad(
      lambda p, r: language_loss(model, p, state.router, r, weight, second, c), has_aux=True)

    def microbatch(total, r):
      (_, aux), grads = value_and_grad(state.params, r)
      return jax.tree.map(jnp.add, total, (grads, aux)), None
    shapes = jax.eval_shape(lambda r: (lambda v, g: (g, v[1]))(*value_and_grad(state.params, r)),
                            jax.tree.map(lambda a: a[0], rows))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, (metrics, load)), _ = jax.lax.scan(microbatch, zeros, rows)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    router = move_bias(state.router, load, c.bias_rate)
    metrics |= {'grad_norm': optax.global_norm(grads), **router_metrics(router, load)}
    state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                          router=router, opt_state=opt_state)
    return state, metrics
  return update


class Pretraining:
  """The stage's pieces, made once: model, optimizer, mesh, data, jitted update."""

  def __init__(self, config, mesh):
    c = config.pretrain
    self.config, self.mesh = config, mesh
    self.model = configs.model_config(config)
    self.optimizer = make_optimizer(config, c.steps)
    start = Start(config, self.model, self.optimizer, mesh, reference=False)
    self.start, self.init, self.abstract, self.shardings = start, start.init, start.abstract, start.shardings
    self.rows_sharding = meshes.rows(mesh, leading=1)
    self.update = jax.jit(
      make_update(self.model, self.optimizer, c), donate_argnums=0,
      in_shardings=(self.shardings, self.rows_sharding), out_shardings=(self.shardings, meshes.everywhere(mesh)))

  def programs(self) -> list[Program]:
    c = self.config.pretrain
    shape = (c.rows_per_step // c.microbatch_rows, c.microbatch_rows, c.row_tokens)
    rows = {k: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.rows_sharding)
            for k in ('ids', 'positions', 'segments')}
    return [self.start.program(), Program('pretrain update', self.update, (self.abstract, rows))]

  def initial_state(self):
    """Random weights, or those of config.init_from. Raises ValueError before any compile where they do not fit."""
    return self.start.state()

  def data(self):
    c, tokenizer = self.config.pretrain, load_tokenizer(self.config.tokenizer)
    source = CorpusRows(configs.chain_task(self.config), configs.corpus_mix(self.config), tokenizer,
                        self.config.seed, c.rows_per_step * c.steps, c.row_tokens)
    return batches(source, c.rows_per_step)


def run(config, workdir, mesh) -> dict:
  """Trains, saves, writes base.safetensors into the workdir, returns the summary."""
  c, stage = config.pretrain, Pretraining(config, mesh)
  folder = Run(config, workdir)
  if summary := folder.finished():
    folder.close()
    return summary
  folder.catch_signals()
  data, done, spent, metrics = stage.data(), 0, 0.0, {}
  state = None if folder.begun else stage.initial_state()  # before the folder is written to, as it may refuse
  restored = folder.restore(stage.abstract)
  if restored:
    done, state, host = restored
    data.set_state(host['data'])
    spent, metrics = host['seconds'], host['metrics']
  compiles, started, last = CompileCounter(), time.time(), time.time()
  bar = tqdm.tqdm(total=c.steps, initial=done, unit='step', disable=not folder.main, mininterval=1)
  step = done
  while step < c.steps and not folder.stop_requested:
    rows = {k: v.reshape(-1, c.microbatch_rows, c.row_tokens) for k, v in next(data).items()}
    state, metrics = stage.update(state, rows)
    step += 1
    metrics = jax.device_get(metrics)
    if not np.isfinite(metrics['loss']):
      raise FloatingPointError(f'step {step}: the loss is {metrics["loss"]}; the newest checkpoint in {folder.path} is '
                               'whole. Lower optim.lr and start again in another workdir')
    now = time.time()
    rate, last = c.rows_per_step * c.row_tokens / (now - last), now
    folder.log(step, metrics, {'tokens_per_second': rate, 'compiles': compiles.count})
    bar.update()
    bar.set_postfix_str(f'loss {metrics["loss"]:.3f} {rate:,.0f} tok/s')
    if config.checkpoint.every and step % config.checkpoint.every == 0 and step < c.steps:
      folder.save(step, state, host_record(data, spent + now - started, metrics))
  spent += time.time() - started
  if step > done:
    folder.save(step, state, host_record(data, spent, metrics))
  bar.close()
  summary = {'steps': step, 'seconds': spent, 'complete': step == c.steps}
  if step == c.steps and folder.main:
    save_weights(folder.path / 'base.safetensors', state.variables, own_fields(stage.model))
    summary['base'] = str(folder.path / 'base.safetensors')
    write_card(folder.path, config, summary)
  summary |= {k: float(v) for k, v in metrics.items()}
  folder.summary(summary)
  folder.close()
  return summary


def host_record(data, seconds: float, metrics: dict) -> dict:
  """What a checkpoint holds besides the state."""
  return {'data': data.get_state(), 'seconds': seconds, 'metrics': {k: float(v) for k, v in metrics.items()}}


def write_card(path: pathlib.Path, config, summary: dict):
  """base.json beside base.safetensors: what made it, and its first steps' losses, so that the making can be checked."""
  with (path / 'metrics.jsonl').open() as f:
    lines = [json.loads(line) for line in itertools.islice(f, 5)]
  first = [{k: line[k] for k in ('step', 'loss', 'ce', 'grad_norm')} for line in lines]
  card = {'config': json.loads(config.to_json_best_effort()), 'first_steps': first, 'seconds': summary['seconds'],
          'jax': jax.__version__, 'device': jax.devices()[0].device_kind}
  (path / 'base.json').write_text(json.dumps(card, indent=1) + '\n')
