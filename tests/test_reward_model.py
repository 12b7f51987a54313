"""The reward model: its data, its loss, its stage and its use as a term of the reward."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from tiny import assert_trees_close, tiny_model, tiny_variables

from moe_rl import config as configs
from moe_rl.data import preferences
from moe_rl.data.general import preference_pairs
from moe_rl.data.preferences import Encoder, Example
from moe_rl.data.problem_files import DataError
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.models.transformer import Transformer
from moe_rl.rl import preference
from moe_rl.rl.rewards.model import SHORTEST, RewardModel, make_last_scores
from moe_rl.runtime.run import Run
from moe_rl.runtime.state import TrainState
from moe_rl.stages import reward_model
from moe_rl.stages.reward_model import RewardModelling

ROWS = dict(row_tokens=32, microbatch_rows=2)


def write_lines(path, lines) -> str:
  path.write_text(''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines))
  return str(path)


# Data.


def test_files_of_pairs_and_of_safe_and_unsafe_answers_are_read(tmp_path):
  pairs = write_lines(tmp_path / 'pairs.jsonl', [dict(question='q', chosen=' a', rejected='b', judge='x')])
  assert preferences.read_judgements(pairs, 'helpfulness') == [preferences.Judgement(1, 'q', ('a', 'b'))]
  safe = write_lines(tmp_path / 'safe.jsonl', [dict(question='q', response='a', safe=s) for s in (True, False)])
  assert [j.good for j in preferences.read_judgements(safe, 'safety')] == [True, False]


@pytest.mark.parametrize('kind, line, words', [
  ('helpfulness', dict(question='q', chosen='a'), "field 'rejected' is missing (the record has 'question', 'chosen')"),
  ('helpfulness', dict(question='q', chosen='a', rejected='a'), 'are the same text: delete the record'),
  ('safety', dict(question='q', response='a', safe='yes'), "field 'safe' must be true or false"),
  ('safety', dict(question='q', response='', safe=True), "field 'response' is empty"),
  ('safety', ['q'], 'is an array, not a JSON object')])
def test_a_bad_line_is_named_with_its_number_and_remedy(tmp_path, kind, line, words):
  good = dict(question='q', chosen='a', rejected='b', response='a', safe=True)
  path = write_lines(tmp_path / 'data.jsonl', [good, line])
  with pytest.raises(DataError, match=re.escape(words)) as error:
    preferences.read_judgements(path, kind)
  assert f'{path}:2: ' in str(error.value) and '1 of 2 records' in str(error.value)


def test_balancing_leaves_out_the_most_unequal_pairs_of_the_heavier_side_until_the_sum_turns():
  longer = np.array([5, -1, 9, 0, 2, -3, 1])
  kept = preferences.balance(longer)
  assert kept.tolist() == [False, True, False, True, True, True, True] and longer[kept].sum() == -1
  assert preferences.balance(-longer).tolist() == kept.tolist()
  assert preferences.balance(np.array([3, -3, 0])).all() and not preferences.balance(np.array([4, 4])).any()


def test_helpfulness_reads_the_final_summary_alone_and_safety_everything():
  tokenizer = load_tokenizer('tiny')
  helpful, safe = (Encoder(kind, 'short', tokenizer) for kind in preferences.KINDS)
  first, second = (f'<think>{t}</think><answer>three four</answer>' for t in ('up', 'a much longer thought'))
  assert helpful('q', first) == helpful('q', second) == helpful('q', 'three four')
  assert tokenizer.decode(helpful('q', first)) == 'User:qAssistant:three four'
  assert helpful('q', '<think>and so on') == helpful('q', '<think>')  # a thought that never ends leaves nothing
  assert safe('q', first) != safe('q', second) and tokenizer.decode(safe('q', first)).endswith(first)
  assert all(ids[-1] == tokenizer.eos_id for ids in (helpful('q', first), safe('q', first)))


# The loss.


@pytest.fixture(scope='module')
def net():
  return Transformer(tiny_model(head='scalar'))


@pytest.fixture(scope='module')
def variables(net):
  return tiny_variables(net.config)


def examples_of(pairs: bool, count: int = 5) -> list[Example]:
  rng = np.random.default_rng(1)

  def ids():
    return tuple(rng.integers(2, 64, rng.integers(3, 12)).tolist())
  return [Example((ids(), ids())) if pairs else Example((ids(),), bool(i % 2)) for i in range(count)]


@pytest.fixture(scope='module')
def last_scores(net):
  return jax.jit(make_last_scores(net))


@pytest.fixture(scope='module')
def plain_loss(net):
  """(params, router, ids [10, 12], length [10], signs [5, 10]) -> mean over the signs' rows of log(1 + exp(-margin)):
  every answer in a row by itself."""
  score = make_last_scores(net)

  def loss(params, router, ids, length, signs):
    margin = signs @ score({'params': params, 'router': router}, ids, length)
    return jnp.log1p(jnp.exp(-margin)).mean()
  return jax.jit(jax.value_and_grad(loss))


def alone(examples):
  """ids, length, signs for `plain_loss`."""
  ids, length, signs = np.zeros((10, 12), np.int32), np.zeros(10, np.int32), np.zeros((5, 10), np.float32)
  row = 0
  for i, example in enumerate(examples):
    for sign, sequence in zip((1 if example.good else -1, -1), example.sequences, strict=False):
      ids[row, :len(sequence)], length[row], signs[i, row] = sequence, len(sequence), sign
      row += 1
  return ids, length, signs


class Keep:
  """An optimizer that hands the gradient back as the change, so that an update shows it."""

  @staticmethod
  def update(grads, state, params):
    return grads, state


@pytest.fixture(scope='module')
def update(net):
  return jax.jit(preference.make_preference_update(net, Keep, 5))


@pytest.mark.parametrize('pairs', [True, False])
def test_loss_and_gradient_on_packed_microbatches_are_those_of_single_answers(update, plain_loss, variables, pairs):
  """float32 sums in another order: 1e-5 of the largest entry of a gradient, 1e-6 of the loss."""
  examples = examples_of(pairs)
  batch, used = preference.pack(examples, **ROWS, count=7)
  assert batch.ids.shape == (4, 2, 32) and 1 <= used < 4  # several a row, fewer microbatches than there is room for
  assert (batch.segments.max(-1) > 1).any()
  state = TrainState(jnp.int32(0), variables['params'], variables['router'], {}, {})
  after, metrics = update(state, batch, np.int32(used))
  loss, grads = plain_loss(variables['params'], variables['router'], *alone(examples))
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  found = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, after.params, variables['params'])
  assert_trees_close(found, grads, 1e-5)
  assert jax.tree.all(jax.tree.map(np.array_equal, after.router, variables['router']))


def test_hand_computed_margins():
  score = jnp.array([[1.0, 2.0, 0.5, -1.0]])
  batch = preference.PreferenceBatch(*[None] * 3, jnp.array([[0, 1.0, 0, -1.0]]), jnp.array([[-1, 2, -1, -1]]))
  assert preference.margins(score, batch).tolist() == [[0, 1.5, 0, 1.0]]
  assert preference.right(np.array([1.5, 0.0, -1.0])).tolist() == [1, 0.5, 0]


def test_a_fresh_head_ties_every_pair_so_the_first_loss_is_log_two(plain_loss, variables, net):
  fresh = variables['params'] | {'scalar': np.zeros(net.config.width, np.float32)}
  loss, grads = plain_loss(fresh, variables['router'], *alone(examples_of(True)))
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  assert np.abs(grads['scalar']).max() > 0 == np.abs(grads['embed']).max()  # the head moves first


# The stage: from a base to a folder, in this process.


def config_of(path: str, **changes):
  config = runs.config_of('reward_model.py', {
    'model': runs.MODEL, 'init_from': '', 'optim': dict(lr=1e-2, final_lr=1e-3, warmup_steps=0),
    'checkpoint': dict(every=2),
    'reward_model': dict(path=path, examples_per_step=8, held_out=16, row_tokens=128, microbatch_rows=4)})
  config.model.max_length = 128
  config.update(changes)
  return config


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  return write_lines(tmp_path_factory.mktemp('pairs') / 'pairs.jsonl', preference_pairs(0, 64))


@pytest.fixture(scope='module')
def trained(tmp_path_factory, pairs, mesh):
  workdir = tmp_path_factory.mktemp('reward') / 'run'
  return workdir, reward_model.run(config_of(pairs), workdir, mesh)


def test_a_run_tells_what_it_read_and_how_many_pairs_it_ranks_right(trained):
  workdir, summary = trained
  assert summary['complete'] and summary['kind'] == 'helpfulness'
  assert summary['examples'] + summary['left_out'] == 64 - 16
  assert summary['steps'] == -(-summary['examples'] // 8)
  assert (summary['first']['accuracy'], summary['first']['examples']) == (0.5, 16)
  np.testing.assert_allclose(summary['first']['loss'], np.log(2), rtol=1e-6)
  steps = runs.metrics(workdir)
  assert [s['step'] for s in steps] == list(range(1, summary['steps'] + 1))
  assert steps[-1]['held_out/accuracy'] == summary['last']['accuracy']
  assert steps[-1]['loss'] < steps[0]['loss']
  assert summary == runs.summary(workdir) and sum(s['tokens'] for s in steps) == summary['tokens']


def test_a_run_that_was_stopped_and_gone_on_with_is_the_run_that_was_not(trained, pairs, tmp_path, mesh, monkeypatch):
  """Bit for bit, in new objects; the fresh processes of test_resume.py use the same Run."""
  logged = Run.log

  def stop_at_three(self, step, *rest):
    logged(self, step, *rest)
    self.stop_requested |= step == 3
  monkeypatch.setattr(Run, 'log', stop_at_three)
  assert not reward_model.run(config_of(pairs), tmp_path / 'run', mesh)['complete']
  monkeypatch.undo()
  summary = reward_model.run(config_of(pairs), tmp_path / 'run', mesh)
  clocks = {'seconds': 0, 'costs': 0}
  assert summary | clocks == trained[1] | clocks
  assert runs.metrics(tmp_path / 'run') == runs.metrics(trained[0])
  state, wanted = (runs.restored(w)[0] for w in (tmp_path / 'run', trained[0]))
  assert all(leaf.tobytes() == wanted[name].tobytes() for name, leaf in state.items()) and state.keys() == wanted.keys()


def test_the_programs_are_those_that_run(pairs, mesh):
  config = configs.with_example_length(config_of(pairs), 100)
  stage = RewardModelling(config, mesh, 5)
  listed = {program.name: program for program in stage.programs()}
  assert {id(p.function) for p in listed.values()} == {id(v) for v in vars(stage).values() if hasattr(v, 'lower')}
  batch, used = stage.packed([Example(((2, 3), (4, 5)))] * 8)
  _, wanted, count = listed['preference update'].arguments
  for name in ('ids', 'positions', 'segments', 'sign', 'other'):
    found, abstract = getattr(batch, name), getattr(wanted, name)
    assert (found.shape, found.dtype) == (abstract.shape, abstract.dtype), name
  assert (used.shape, used.dtype) == (count.shape, count.dtype)


# Its use.


@pytest.fixture(scope='module')
def judge(trained, mesh):
  return RewardModel(trained[0], mesh)


def test_scores_are_the_heads_at_the_last_token_whoever_is_scored_beside_it(judge):
  """1e-5: the neighbours change the order of sums among an expert's tokens, nothing else."""
  lines = preference_pairs(3, 40)
  questions = [line['question'] for line in lines for _ in range(2)]
  answers = [line[key] for line in lines for key in ('chosen', 'rejected')]
  answers[5] += ' ' + 'one two ' * 10  # in a wider batch
  together = judge.scores(questions, answers)
  assert together.dtype == np.float32 and together.std() > 1e-3
  np.testing.assert_array_equal(judge.scores(questions, answers), together)
  alone = [judge.scores([questions[i]], [answers[i]])[0] for i in (0, 5, 37)]
  np.testing.assert_allclose(alone, together[[0, 5, 37]], rtol=0, atol=1e-5)
  order = np.random.default_rng(0).permutation(len(answers))
  shuffled = judge.scores([questions[i] for i in order], [answers[i] for i in order])
  np.testing.assert_allclose(shuffled, together[order], rtol=0, atol=1e-5)
  ids = np.array([judge._encode(questions[0], answers[0])], np.int32)  # by itself, unpadded
  plain = jax.jit(make_last_scores(Transformer(judge.model)))(judge.variables, ids, np.array([ids.size], np.int32))
  np.testing.assert_allclose(plain[0], together[0], rtol=0, atol=1e-5)


def test_thoughts_change_no_score_of_helpfulness_and_too_long_answers_are_counted(judge):
  a, b = (f'<think>{t}</think><answer>three four</answer>' for t in ('up', 'down from nine'))
  scores = judge.scores(['count from 3 to 4'] * 2, [a, b])
  assert scores[0] == scores[1] and judge.cut == 0
  assert np.isfinite(judge.scores(['count from 3 to 4'], ['three ' * 100])).all() and judge.cut == 1


def test_one_program_for_each_width_up_to_the_longest(judge):
  programs = judge.programs(100)
  assert [p.name for p in programs] == [f'reward model {SHORTEST}', f'reward model {2 * SHORTEST}']
  assert [p.arguments[1].shape for p in programs] == [(32, 64), (16, 128)]


def test_a_language_model_is_no_reward_model_and_a_reward_model_no_start_of_rl(trained, mesh, tmp_path):
  with pytest.raises(ValueError, match="'embedded': not a reward model: give the workdir of a run of the stage"):
    RewardModel('embedded', mesh)
  from moe_rl.models.checkpoints import check_speaks, open_checkpoint
  with pytest.raises(ValueError, match='a reward model, which gives a number and no tokens'):
    check_speaks(open_checkpoint(trained[0]))


def test_what_follows_the_last_token_of_a_row_changes_nothing(last_scores, variables):
  ids = np.random.default_rng(0).integers(2, 64, (2, 16)).astype(np.int32)
  other, length = ids.copy(), np.array([5, 9], np.int32)
  other[0, 5:], other[1, 9:] = 7, 8
  first, second = (last_scores(variables, x, length) for x in (ids, other))
  np.testing.assert_array_equal(first, second)
  other[0, 4] += 1
  assert last_scores(variables, other, length)[0] != first[0]
