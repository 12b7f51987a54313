"""Pre-training: next token, second-next token (MTP), balanced experts. One loop over packed rows."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp

from moe_rl import config as configs
from moe_rl.data.pipeline import CorpusRows, batches
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.models.config import own_fields
from moe_rl.models.heads import token_logprobs
from moe_rl.models.transformer import Transformer, for_compute, whole_vocabulary
from moe_rl.models.weights import save_weights
from moe_rl.runtime import hosts
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.programs import Program
from moe_rl.runtime.run import Run
from moe_rl.runtime.state import make_optimizer
from moe_rl.stages.start import Start
from moe_rl.stages.supervised import make_update, train


def language_loss(net: Transformer, c, params, router, rows, share):
  """Sums over a microbatch, already divided by the whole step's counts, so that microbatches add up.

  c: config.pretrain; rows: dict of int32 [N, T]; share: of the step, from `shares`. Returns
  (loss, (metrics, load_LxE)). Loss = CE + mtp_weight CE_2 + balance_weight balance, in nats.
  """
  weight, second_weight = share
  model, variables = net.config, {'params': whole_vocabulary(net, for_compute(net.config, params)), 'router': router}
  ids, positions, segments = rows['ids'], rows['positions'], rows['segments']
  out = net.apply(variables, ids, positions, segments)

  def cross_entropy(logits_of, hidden, ahead):
    hidden, targets = hidden[:, :-ahead], ids[:, ahead:]
    logp, _ = token_logprobs(logits_of, hidden, targets, layout=net.layout)
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
    metrics['balance'] = out.router.balance.mean() * (ids.shape[0] / c.rows_per_step)
    loss = loss + c.balance_weight * metrics['balance']
    load = out.router.load_E
  return loss, ({'loss': loss, **metrics}, load)


def has_next(segments, ahead: int):
  """bool [N, T - ahead]: the token `ahead` places on is of the same document."""
  return (segments[:, ahead:] == segments[:, :-ahead]) & (segments[:, ahead:] > 0)


def shares(rows) -> tuple[jax.Array, jax.Array]:
  """1 / tokens of the step that have a next, a second-next token in their segment. rows: of int32 [M, R, T]."""
  segments = rows['segments'].reshape(-1, rows['segments'].shape[-1])
  return tuple(1 / jnp.maximum(has_next(segments, a).sum(), 1) for a in (1, 2))


class Pretraining:
  """The stage's pieces, made once: model, optimizer, mesh, data, jitted update."""

  def __init__(self, config, mesh):
    c = config.pretrain
    self.config, self.mesh = config, mesh
    self.model = configs.model_config(config)
    self.optimizer = make_optimizer(config, c.steps)
    # Context extension scales positions that the weights were made without.
    start = Start(config, self.model, self.optimizer, mesh, reference=False, free=('yarn',))
    self.start, self.init, self.abstract, self.shardings = start, start.init, start.abstract, start.shardings
    self.rows_sharding = meshes.rows(mesh, leading=1)
    loss = functools.partial(language_loss, Transformer(self.model, meshes.Layout(mesh)), c)
    self.update = jax.jit(
      make_update(loss, shares, self.optimizer, c.bias_rate), donate_argnums=0,
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
    return batches(source, c.rows_per_step, shard=hosts.shard())


def run(config, workdir, mesh) -> dict:
  """Trains, saves, writes base.safetensors into the workdir, returns the summary."""
  c, stage = config.pretrain, Pretraining(config, mesh)
  folder = Run(config, workdir)
  if summary := folder.finished():
    folder.close()
    return summary
  done = train(config, c, folder, stage, stage.data(), c.steps)
  complete = done.step == c.steps
  summary = {'steps': done.step, 'seconds': done.seconds, 'complete': complete, 'costs': done.costs}
  variables = hosts.whole(done.state.variables) if complete else None
  if complete and folder.main:
    save_weights(folder.path / 'base.safetensors', variables, own_fields(stage.model))
    summary['base'] = str(folder.path / 'base.safetensors')
    write_card(folder.path, config, summary)
  summary |= done.last
  folder.summary(summary)
  folder.close()
  return summary


def write_card(path: pathlib.Path, config, summary: dict):
  """base.json beside base.safetensors: what made it, and its first steps' losses, so that the making can be checked."""
  with (path / 'metrics.jsonl').open() as f:
    lines = [json.loads(line) for line in itertools.islice(f, 5)]
  first = [{k: line[k] for k in ('step', 'loss', 'ce', 'grad_norm')} for line in lines]
  card = {'config': json.loads(config.to_json_best_effort()), 'first_steps': first, 'seconds': summary['seconds'],
          'jax': jax.__version__, 'device': jax.devices()[0].device_kind}
  (path / 'base.json').write_text(json.dumps(card, indent=1) + '\n')
