"""Fine-tuning on traces: the loss and gradient of a plain recomputation, with and without a teacher; runs that stop and
go on; and that it learns."""

import functools
import json
import random
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from test_resume import assert_same_run
from tiny import assert_trees_close, tiny_model, tiny_variables

from moe_rl import config as configs
from moe_rl import validation
from moe_rl.data import corpus
from moe_rl.data.pipeline import TraceRows, batches
from moe_rl.data.tasks import Chain
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.data.traces import Example, load_examples
from moe_rl.main import launch
from moe_rl.models.config import own_fields, preset
from moe_rl.models.transformer import Transformer
from moe_rl.models.weights import save_weights
from moe_rl.runtime.run import Run
from moe_rl.runtime.state import TrainState
from moe_rl.stages import sft
from moe_rl.stages.sft import SFT
from moe_rl.stages.supervised import make_update

MODEL = tiny_model(layers=2, dense_layers=0)  # the update is what compiles longest: MoE layers only
SMALL = dict(layers=1, dense_layers=1, width=16, dense_ff=24, heads=2, kv_heads=1, head_dim=8)
TEACHER = preset('tiny_dense', **SMALL, vocab_size=64, init_std=0.4)
RATE = 1024.0  # a power of two, so that dividing it out is exact; and the change is not lost beside the weights
OPTIMIZER = optax.sgd(RATE)


# One step, written out plainly.


@functools.cache
def variables(model=MODEL) -> dict:
  return {'router': {}} | tiny_variables(model, seed=len(own_fields(model)))


@functools.cache
def examples() -> list[Example]:
  """Prompts of 3 and 4 tokens in sequences of 8: one length, so one compilation of the plain model."""
  rng = np.random.default_rng(2)
  return [Example(rng.integers(2, 64, 8).astype(np.int32), 3 + n % 2, str(n)) for n in range(6)]


def step_rows(microbatches: int, rows: int, row_tokens: int) -> dict:
  """All examples as one step, [M, R, T]."""
  source = TraceRows(examples(), 0, 1, microbatches * rows, row_tokens)
  assert source.steps == 1
  stacked = {k: np.stack([source[i][k] for i in range(len(source))]) for k in source[0]}
  return {k: v.reshape(microbatches, rows, row_tokens) for k, v in stacked.items()}


@functools.cache
def update(teacher=False, **changes):
  c = configs.base_config('tiny', 'sft').sft
  c.update(changes)
  loss = functools.partial(sft.trace_loss, Transformer(MODEL), c, Transformer(TEACHER) if teacher else None)
  return jax.jit(make_update(loss, sft.shares, OPTIMIZER, c.bias_rate))


def updated(rows, teacher=False, **changes):
  """(gradient, metrics): the parameters' change under SGD is the gradient."""
  params = variables()['params']
  state = TrainState(jnp.int32(0), params, variables()['router'], OPTIMIZER.init(params), {})
  new, metrics = update(teacher, **changes)(state, rows, *([variables(TEACHER)] if teacher else []))
  return jax.tree.map(lambda old, new: (old - new) / RATE, params, new.params), jax.device_get(metrics)


@functools.cache
def plain(model):
  """(logits of one sequence alone, and the way back from their cotangent), jitted."""
  def logits(params, ids_T):
    net, everything = Transformer(model), {'params': params, 'router': variables(model).get('router', {})}
    positions = jnp.arange(ids_T.size)[None]
    hidden = net.apply(everything, ids_T[None], positions, jnp.ones_like(positions)).hidden_NxTxD
    return net.apply(everything, hidden, method=net.logits)[0]
  return jax.jit(logits), jax.jit(lambda params, ids, cotangent: jax.vjp(lambda p: logits(p, ids), params)[1](
    cotangent)[0])


def log_softmax_of(model, ids) -> np.ndarray:
  logits = np.asarray(plain(model)[0](variables(model)['params'], ids), np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@functools.cache
def plain_step(weight: float, divergence: str):
  """(gradient, metrics) by loops over examples and tokens in float64, the loss differentiated by hand.

  With p the student's probabilities, q the teacher's: d CE / d logits = p - one-hot; d KL(q || p) = p - q;
  d KL(p || q) = p (log p - log q - KL).
  """
  gradient, tokens = None, []
  count = sum(len(e.ids) - e.prompt for e in examples())
  for e in examples():
    log_p, log_q = log_softmax_of(MODEL, e.ids), log_softmax_of(TEACHER, e.ids)
    cotangent = np.zeros_like(log_p)
    for t in range(e.prompt, len(e.ids)):
      lp, lq = log_p[t - 1], log_q[t - 1]
      p, q = np.exp(lp), np.exp(lq)
      kl = (q * (lq - lp)).sum() if divergence == 'forward' else (p * (lp - lq)).sum()
      slope = p - q if divergence == 'forward' else p * (lp - lq - kl)
      cotangent[t - 1] = ((1 - weight) * (p - np.eye(64)[e.ids[t]]) + weight * slope) / count
      tokens.append([-lp[e.ids[t]], kl, e.ids[t] == p.argmax()])
    part = plain(MODEL)[1](variables()['params'], e.ids, cotangent.astype(np.float32))
    gradient = part if gradient is None else jax.tree.map(np.add, gradient, part)
  ce, kl, right = np.mean(tokens, axis=0)
  norm = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(gradient)))
  out = dict(loss=(1 - weight) * ce + weight * kl, ce=ce, kl=kl, accuracy=right, tokens=count, grad_norm=norm)
  return gradient, out


@pytest.mark.parametrize('microbatches, rows, row_tokens, padding, weight, divergence', [
  (1, 4, 16, 16 / 64, 0.0, ''),  # packed in pairs, a row left empty
  (2, 2, 16, 16 / 64, 0.3, 'forward'),
  (2, 3, 9, 6 / 54, 0.3, 'reverse')])  # alone in their rows
def test_loss_and_gradient_are_those_of_single_examples(microbatches, rows, row_tokens, padding, weight, divergence):
  with_teacher = dict(teacher=True, teacher_weight=weight, divergence=divergence) if divergence else {}
  gradient, metrics = updated(step_rows(microbatches, rows, row_tokens), **with_teacher)
  wanted, numbers = plain_step(weight, divergence or 'forward')
  assert numbers['ce'] > 2 and numbers['kl'] > 0.5  # both terms are at work
  for name in numbers.keys() - (set() if divergence else {'kl'}):
    # Means of 27 tokens in float32: 1e-7 seen. A norm is good to what the gradient is.
    assert metrics[name] == pytest.approx(numbers[name], rel=1e-5 if name == 'grad_norm' else 1e-6), name
  # float32 through two layers and back, of the largest entry: 6e-6 seen, where the two are summed in other orders.
  assert_trees_close(gradient, wanted, rtol=1e-5)
  assert metrics['padding'] == pytest.approx(padding, abs=1e-6)
  assert ('kl' in metrics) == bool(divergence) and metrics['load_min'] <= 1 <= metrics['load_max']


def test_accumulation_changes_no_gradient_with_the_balance_term_either():
  one, two = (updated(step_rows(m, r, 16), balance_weight=0.1, bias_rate=1e-3) for m, r in ((1, 4), (4, 1)))
  assert one[1]['loss'] == pytest.approx(one[1]['ce'] + 0.1 * one[1]['balance'], rel=1e-6)
  assert one[1]['balance'] >= 0.5 and one[1]['bias_max'] == np.float32(1e-3)
  assert_trees_close(one[0], two[0], rtol=1e-5)  # the same terms in another order; few tokens take the dense path
  for name, value in one[1].items():
    assert two[1][name] == pytest.approx(value, rel=5e-6), name


def test_a_token_that_is_no_answer_is_no_target():
  """The last tokens of a row are prompts only here, so all that they are is targets of each other."""
  rows = step_rows(1, 4, 16)
  row = np.flatnonzero(rows['segments'][0].max(1) == 2)[0]
  second = rows['segments'][0, row] == 2
  rows['answer'][0, row, second] = False
  changed = {k: v.copy() for k, v in rows.items()}
  changed['ids'][0, row, second] = 63 - rows['ids'][0, row, second]
  (one, metrics), (other, again) = updated(rows), updated(changed)
  assert metrics['loss'] == again['loss'] and metrics['tokens'] == again['tokens'] < 27
  # Their loads differ, so experts' batches do, which is rounding.
  assert_trees_close(one, other, rtol=1e-6)


# Refusals.


def sft_config(tmp_path, experiment='sft.py', **changes):
  """A tiny run on 24 traces; changes by section."""
  path = tmp_path / 'traces.jsonl'
  if not path.exists():
    lines = [json.dumps({'question': f'{n % 9 + 1}+{n % 5 + 1}=?', 'response': '<think>easy</think><answer>'
                         f'{n % 9 + n % 5 + 2}</answer>' + 'abc' * (n % 3)}) for n in range(24)]
    path.write_text('\n'.join([*lines, json.dumps({'question': '1' * 60, 'response': '1'})]) + '\n')
  base = {'model': runs.MODEL, 'optim': dict(lr=1e-2, final_lr=1e-3), 'init_from': '', 'checkpoint': dict(every=3),
          'sft': dict(path=str(path), rows_per_step=4, microbatch_rows=2, row_tokens=48, epochs=3, bias_rate=1e-3)}
  config = runs.config_of(experiment, base)
  for section, values in changes.items():
    config.update({section: values})
  return config


BAD = {
  'no path': (dict(sft=dict(path='')), 'config.sft.path is empty', '--config.sft.path=FILE'),
  'no trace': (dict(sft=dict(path='a.jsonl@0')), "'a.jsonl@0' names no trace"),
  'epochs': (dict(sft=dict(epochs=0)), 'config.sft.epochs is 0, must be positive'),
  'width': (dict(sft=dict(row_tokens=-1)), 'config.sft.row_tokens -1', '0 to derive it'),
  'rows over the mesh': (dict(sft=dict(rows_per_step=6)), 'config.sft.rows_per_step 6', '4 or 8'),
  'rows over microbatches': (dict(sft=dict(rows_per_step=12, microbatch_rows=8)), 'rows_per_step 12', '8 or 16'),
  'microbatch rows over the mesh': (dict(sft=dict(rows_per_step=12, microbatch_rows=6)), 'config.sft.microbatch_rows 6',
                                    '4 or 8'),
  'divergence': (dict(sft=dict(divergence='backward')), "config.sft.divergence 'backward'", 'forward, reverse'),
  'teacher weight': (dict(sft=dict(teacher_weight=1.5)), 'config.sft.teacher_weight 1.5 must be in 0..1'),
  'balance': (dict(sft=dict(balance_weight=-1.0)), 'config.sft.balance_weight -1.0'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_config_is_refused_with_the_remedy(name, tmp_path):
  changes, *parts = BAD[name]
  with pytest.raises(ValueError) as error:
    validation.validate(sft_config(tmp_path, **changes), devices=4 if 'row' in name else 1, vocab_size=10)
  assert all(part in str(error.value) for part in parts), error.value


def test_sizes_left_to_be_derived_divide():
  config = configs.base_config('tiny', 'sft')
  found = {}
  for rows, longest, devices in ((32, 40, 1), (48, 130, 1), (32, 900, 1), (32, 5000, 8), (24, 40, 8)):
    config.sft.rows_per_step = rows
    s = configs.with_row_tokens(config, longest, devices).sft
    found[rows, longest, devices] = (s.row_tokens, s.microbatch_rows)
  assert found == {(32, 40, 1): (128, 4), (48, 130, 1): (144, 3), (32, 900, 1): (912, 1), (32, 5000, 8): (5008, 8),
                   (24, 40, 8): (128, 24)}


@pytest.fixture
def teacher(tmp_path):
  """(changes of the model) -> path of a dense teacher's file, vocabulary 384."""
  def write(**changes) -> str:
    model = preset('tiny_dense', **SMALL | changes)
    path = tmp_path / f'teacher{len(list(tmp_path.iterdir()))}.safetensors'
    save_weights(path, tiny_variables(model), own_fields(model), 'float32')
    return str(path)
  return write


def test_a_teacher_that_cannot_teach_is_refused(tmp_path, teacher):
  for path, parts in ((teacher(vocab_size=400), ('has 400 tokens, config.model.vocab_size is 384', 'same family')),
                      (teacher(max_length=32), ('reads 32 tokens, config.sft.row_tokens is 48',)),
                      ('/no/such', ("config.sft.teacher '/no/such': cannot be read",))):
    config = sft_config(tmp_path, sft=dict(teacher=path))
    with pytest.raises(ValueError) as error:
      launch(config, tmp_path / 'run')
    assert all(part in str(error.value) for part in ('config.sft.teacher', *parts)), error.value
    assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_teacher_of_other_words_is_refused(tmp_path, teacher, monkeypatch, mesh):
  class Other:
    source, pieces, special = 'other.model', [b'x'], {}
  monkeypatch.setattr(sft, 'tokenizer_of', lambda checkpoint: Other)
  with pytest.raises(ValueError, match=r'its tokenizer \(other.model\) is not config.tokenizer'):
    SFT(sft_config(tmp_path, sft=dict(teacher=teacher())), mesh, 3, load_tokenizer('tiny'))


# Runs.


def test_the_programs_are_those_that_run(tmp_path, teacher, mesh):
  """Law 8: lowered from the list, without an array, each is the program of the real call."""
  config = sft_config(tmp_path, sft=dict(teacher=teacher()))
  stage = SFT(config, mesh, 5, load_tokenizer('tiny'))
  assert {id(v) for v in vars(stage).values() if hasattr(v, 'lower')} == {id(p.function) for p in stage.programs()}
  init, listed = stage.programs()
  assert (init.name, listed.name) == ('init', 'SFT update')
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), stage.abstract)
  rows = next(batches(TraceRows(load_examples(config, load_tokenizer('tiny')).kept, 0, 1, 4, 48), 4))
  rows = {k: v.reshape(2, 2, 48) for k, v in rows.items()}
  real = stage.update.lower(zeros, rows, *stage.frozen_arrays())
  assert listed.lower().as_text() == real.as_text()


@pytest.fixture(scope='module')
def whole(tmp_path_factory, mesh):
  """(folder with the traces, workdir of an uninterrupted run, its summary). Runs of this config share a stage, so that
  it is compiled once."""
  folder, made = tmp_path_factory.mktemp('sft'), []

  def made_once(*arguments):
    made.extend([] if made else [SFT(*arguments)])
    return made[0]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sft, 'SFT', made_once)
    yield folder, folder / 'whole', sft.run(sft_config(folder), folder / 'whole', mesh)


def test_the_summary_counts_and_the_loss_falls(whole):
  folder, workdir, summary = whole
  assert summary == runs.summary(workdir)
  found = load_examples(sft_config(folder), load_tokenizer('tiny'))
  assert (summary['examples'], summary['left_out']) == (24, 1) and summary['complete']
  assert (summary['tokens'], summary['response_tokens']) == (found.tokens, found.response_tokens)
  lines = runs.metrics(workdir)
  assert [line['step'] for line in lines] == list(range(1, summary['steps'] + 1))
  assert sum(line['tokens'] for line in lines) == 3 * found.response_tokens  # all of it, as often as epochs say
  assert (summary['first_loss'], summary['last_loss']) == (lines[0]['loss'], lines[-1]['loss'])
  assert summary['last_loss'] < summary['first_loss'] - 1


def test_a_run_that_is_stopped_and_goes_on_equals_one_that_was_not(whole, mesh, monkeypatch):
  """Bit for bit; stopped in the second epoch, by the signal of a preempted machine."""
  folder, wanted, summary = whole
  log, at = Run.log, summary['steps'] // 2

  def log_and_stop(self, step, *numbers):
    log(self, step, *numbers)
    if step == at:
      signal.raise_signal(signal.SIGTERM)
  monkeypatch.setattr(Run, 'log', log_and_stop)
  stopped = sft.run(sft_config(folder), folder / 'stopped', mesh)
  assert stopped['steps'] == at and not stopped['complete']
  monkeypatch.undo()
  sft.run(sft_config(folder), folder / 'stopped', mesh)
  assert_same_run(folder / 'stopped', wanted)
  assert sft.run(sft_config(folder), folder / 'stopped', mesh) == runs.summary(folder / 'stopped')


def test_a_run_does_not_go_on_with_other_traces(whole, tmp_path, mesh):
  folder, workdir, _ = whole
  config, summary = sft_config(folder), (workdir / 'summary.json').read_text()
  path = folder / 'traces.jsonl'
  before = path.read_text()
  (workdir / 'summary.json').unlink()
  path.write_text(before.replace('easy', 'sure'))
  try:
    with pytest.raises(ValueError, match='what the config names was traces [0-9a-f]{8} when this run began'):
      sft.run(config, workdir, mesh)
  finally:
    path.write_text(before)
    (workdir / 'summary.json').write_text(summary)


# Learning.


def perfect_traces(path, count: int):
  """Step-by-step answers in English, all right, as the corpus has some."""
  chain, rng = Chain(), random.Random('traces')
  mix = corpus.Mix(slip=0.0, check=0.0, mixed=0.0)
  with path.open('w') as f:
    while count:
      question, totals = chain.draw(rng)
      thinking, answer = corpus.work(question, totals, mix, rng)
      if not any(word in thinking for word in ('然后', '检查')):
        count -= 1
        f.write(json.dumps({'question': question, 'response': f'<think>{thinking}</think><answer>{answer}</answer>'})
                + '\n')


def test_the_base_learns_from_perfect_traces(tmp_path, mesh):
  perfect_traces(tmp_path / 'traces.jsonl', 200)
  config = runs.config_of('sft.py', {'sft': dict(path=str(tmp_path / 'traces.jsonl'), rows_per_step=8, epochs=1,
                                                 row_tokens=128, microbatch_rows=8)})
  found = load_examples(config, load_tokenizer('tiny'))
  rows = TraceRows(found.kept, 0, 1, 8, 128)
  stage = SFT(config, mesh, rows.steps)
  state, data, losses = stage.initial_state(), batches(rows, 8), []
  for _ in range(rows.steps):
    state, metrics = stage.update(state, {k: v[None] for k, v in next(data).items()})
    losses.append(float(metrics['loss']))
  # The base thinks in steps in one document of four, and half of these in Chinese: the first tokens of a thought and
  # the words between steps are what it is unsure of, 0.1 nats a token. After an epoch, that is settled.
  assert losses[0] > 0.06 and np.mean(losses[-3:]) < 0.02, losses
