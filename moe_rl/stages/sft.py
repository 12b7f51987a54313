"""Supervised fine-tuning on traces (DeepSeek-R1, arXiv:2501.12948, sec. 2.3), and distillation: the same loop with a
dense student, on the text of a teacher's answers alone or towards the teacher's distributions too."""

import dataclasses
import functools
import json
import zlib

import jax
import jax.numpy as jnp

from moe_rl import config as configs
from moe_rl.data.pipeline import TraceRows, batches
from moe_rl.data.tokenizer import Tokenizer, load_tokenizer
from moe_rl.data.traces import Examples, load_examples
from moe_rl.models.checkpoints import Checkpoint, check, open_checkpoint
from moe_rl.models.config import ModelConfig
from moe_rl.models.heads import taught
from moe_rl.models.hf_import import load_variables
from moe_rl.models.transformer import Transformer, for_compute, whole_vocabulary
from moe_rl.models.weights import EMBEDDED
from moe_rl.refusals import refuse
from moe_rl.runtime import hosts
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.costs import forward_flops
from moe_rl.runtime.programs import Program
from moe_rl.runtime.run import Run
from moe_rl.runtime.state import compute_variables, make_optimizer
from moe_rl.stages.spent import training_flops
from moe_rl.stages.start import Start
from moe_rl.stages.supervised import make_update, train
from moe_rl.validation import check_table


def trace_loss(net: Transformer, c, teacher_net: Transformer | None, params, router, rows, share, teacher=None):
  """Sums over a microbatch, already divided by the whole step's counts, so that microbatches add up.

  c: config.sft; rows: of `TraceRows`, [N, T]; share: of the step, from `shares`; teacher: its variables. Returns
  (loss, (metrics, load_LxE)). Loss, in nats = CE of response tokens, or with a teacher
  (1 - teacher_weight) CE + teacher_weight KL, a mean over the step's response tokens each; + balance_weight balance.
  accuracy: the share of response tokens that are the likeliest; tokens: of responses; padding: the share of cells.
  """
  ids, positions, segments, answer = (rows[k] for k in ('ids', 'positions', 'segments', 'answer'))
  answer = answer[:, 1:]

  def run(net, params, router):
    variables = {'params': whole_vocabulary(net, for_compute(net.config, params)), 'router': router}
    out = net.apply(variables, ids, positions, segments)
    return out, (lambda h: net.apply(variables, h, method=net.logits), out.hidden_NxTxD[:, :-1])

  def mean(x):
    return (x * answer).sum() * share['token']
  out, (logits_of, hidden) = run(net, params, router)
  guide = run(teacher_net, teacher['params'], teacher['router'])[1] if teacher_net else None
  logp, right, apart = taught(logits_of, hidden, ids[:, 1:], guide, c.divergence, layout=net.layout)
  loss = ce = mean(-logp)
  metrics = {'ce': ce, 'accuracy': mean(right), 'tokens': answer.sum(),
             'padding': (segments == 0).sum() * share['cell']}
  if teacher_net:
    metrics['kl'] = mean(apart)
    loss = (1 - c.teacher_weight) * ce + c.teacher_weight * metrics['kl']
  load = jnp.zeros((0, 0))
  if out.router is not None:
    metrics['balance'] = out.router.balance.mean() * (segments > 0).any(1).sum() * share['row']
    loss = loss + c.balance_weight * metrics['balance']
    load = out.router.load_E
  return loss, ({'loss': loss, **metrics}, load)


def shares(rows) -> dict[str, jax.Array]:
  """1 / response tokens, 1 / rows with a token, 1 / cells of the step. rows: of `TraceRows`, [M, R, T]."""
  return {'token': 1 / jnp.maximum(rows['answer'].sum(), 1),
          'row': 1 / jnp.maximum((rows['segments'] > 0).any(-1).sum(), 1), 'cell': 1 / rows['segments'].size}


@dataclasses.dataclass(frozen=True)
class Teacher:
  """model: its sizes, run as the student is; wanted: its variables as ShapeDtypeStructs, sharded by the same table."""

  checkpoint: Checkpoint
  model: ModelConfig
  wanted: dict

  def variables(self) -> dict:
    return load_variables(self.checkpoint, self.model, self.wanted)


def open_teacher(config, student: ModelConfig, mesh, tokenizer: Tokenizer | None) -> Teacher:
  """The teacher of config.sft.teacher, from its headers. Raises ValueError where it cannot be read or the student
  cannot learn from it."""
  try:
    checkpoint = open_checkpoint(config.sft.teacher)
    model = dataclasses.replace(checkpoint.model, mtp_layers=0, compute_dtype=student.compute_dtype, remat='none')
    check(checkpoint, model)
    refuse(model.vocab_size != student.vocab_size,
           f'{checkpoint.where}: its vocabulary has {model.vocab_size} tokens, config.model.vocab_size is '
           f'{student.vocab_size}: distributions can be compared over one vocabulary only. Take a student of '
           "the same family, or config.sft.teacher='' with traces, which are text")
    refuse(model.max_length < config.sft.row_tokens,
           f'{checkpoint.where}: it reads {model.max_length} tokens, config.sft.row_tokens is '
           f'{config.sft.row_tokens}: lower that')
    theirs = tokenizer_of(checkpoint)
    refuse(tokenizer and theirs and not same_words(tokenizer, theirs),
           f'{checkpoint.where}: its tokenizer ({theirs and theirs.source}) is not config.tokenizer '
           f"({tokenizer and tokenizer.source}), so its distributions are over other words: give the teacher's "
           "tokenizer, or config.sft.teacher='' with traces, which are text")
    check_table(model, mesh.shape)
  except ValueError as e:
    raise ValueError(f'config.sft.teacher {e}') from e
  return Teacher(checkpoint, model, compute_variables(model, mesh, meshes.TRAINING))


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
  """The tokenizer that is known to belong to the weights, if any."""
  if checkpoint.kind == 'run':
    return load_tokenizer(json.loads((checkpoint.path / 'config.json').read_text())['tokenizer'])
  if checkpoint.kind == 'hub':
    there = any((checkpoint.path / name).exists() for name in ('tokenizer.json', 'tokenizer.model'))
    return load_tokenizer(checkpoint.path) if there else None
  return load_tokenizer('tiny') if checkpoint.path == EMBEDDED else None


def same_words(one: Tokenizer, other: Tokenizer) -> bool:
  """Whether each id means the same to both."""
  return one.pieces == other.pieces and one.special == other.special


class SFT:
  """The stage's pieces, made once: model, optimizer, teacher, jitted update.

  config: with its sizes known (`config.with_row_tokens`); steps: how many the traces give; tokenizer: of
  config.tokenizer, if the teacher's is to be compared with it.
  """

  def __init__(self, config, mesh, steps: int, tokenizer: Tokenizer | None = None):
    c = config.sft
    self.config, self.mesh = config, mesh
    self.model = dataclasses.replace(configs.model_config(config), mtp_layers=0)  # not trained on traces
    self.optimizer = make_optimizer(config, steps)
    start = Start(config, self.model, self.optimizer, mesh, reference=False)
    self.start, self.init, self.abstract, self.shardings = start, start.init, start.abstract, start.shardings
    self.rows_sharding = meshes.rows(mesh, leading=1)
    self.teacher = open_teacher(config, self.model, mesh, tokenizer) if c.teacher else None
    self.frozen = (self.teacher.wanted,) if self.teacher else ()
    layout = meshes.Layout(mesh)
    loss = functools.partial(trace_loss, Transformer(self.model, layout), c,
                             Transformer(self.teacher.model, layout) if self.teacher else None)
    self.update = jax.jit(
      make_update(loss, shares, self.optimizer, c.bias_rate), donate_argnums=0,
      in_shardings=(self.shardings, self.rows_sharding, *jax.tree.map(lambda x: x.sharding, self.frozen)),
      out_shardings=(self.shardings, meshes.everywhere(mesh)))

  def programs(self) -> list[Program]:
    c = self.config.sft
    shape = (c.rows_per_step // c.microbatch_rows, c.microbatch_rows, c.row_tokens)
    rows = {k: jax.ShapeDtypeStruct(shape, bool if k == 'answer' else jnp.int32, sharding=self.rows_sharding)
            for k in ('ids', 'positions', 'segments', 'answer')}
    return [self.start.program(), Program('SFT update', self.update, (self.abstract, rows, *self.frozen))]

  def initial_state(self):
    """Random weights, or those of config.init_from. Raises ValueError before any compile where they do not fit."""
    return self.start.state()

  def flops(self, tokens: float, context: float) -> float:
    """Useful FLOPs of training on so many tokens that see `context` tokens each, the teacher's reading included."""
    teacher = forward_flops(self.teacher.checkpoint.model, tokens, context) if self.teacher else 0.0
    return training_flops(self.model, tokens, context) + teacher

  def frozen_arrays(self) -> tuple:
    """The teacher's weights, where there is one."""
    return (self.teacher.variables(),) if self.teacher else ()


def run(config, workdir, mesh) -> dict:
  """Trains on every trace config.sft.epochs times, from wherever the workdir is; returns (and writes) the summary."""
  tokenizer = load_tokenizer(config.tokenizer)
  examples = load_examples(config, tokenizer)
  sized = configs.with_row_tokens(config, examples.longest, meshes.rows_over(mesh.shape))
  c = sized.sft
  rows = TraceRows(examples.kept, config.seed, c.epochs, c.rows_per_step, c.row_tokens)
  folder = Run(config, workdir)
  if summary := folder.finished():
    folder.close()
    return summary
  stage = SFT(sized, mesh, rows.steps, tokenizer)
  counts = {'examples': len(examples.kept), 'left_out': examples.left_out, 'tokens': examples.tokens,
            'response_tokens': examples.response_tokens}  # of an epoch
  print('\n'.join(examples.notes), flush=True)
  print(f'{rows.steps:,} steps: {c.epochs} epochs of {examples.tokens:,} tokens ({examples.response_tokens:,} of '
        f'responses) in rows of {c.row_tokens:,}, {c.rows_per_step} a step, {c.microbatch_rows} at once', flush=True)
  done = train(sized, c, folder, stage, batches(rows, c.rows_per_step, shard=hosts.shard()), rows.steps,
               frozen=stage.frozen_arrays, given=given(examples, stage.teacher), flops=stage.flops)
  summary = {'steps': done.step, 'seconds': done.seconds, 'complete': done.step == rows.steps, **counts,
             'costs': done.costs, 'first_loss': done.first.get('loss'), 'last_loss': done.last.get('loss')}
  folder.summary(summary)
  folder.close()
  return summary


def given(examples: Examples, teacher: Teacher | None) -> str:
  """What the run was given besides its config: files may change under their names."""
  crc = 0
  for e in examples.kept:
    crc = zlib.crc32(e.ids.tobytes(), zlib.crc32(str(e.prompt).encode(), crc))
  return f'traces {crc:08x}' + (f', teacher at step {teacher.checkpoint.step}' if teacher else '')
