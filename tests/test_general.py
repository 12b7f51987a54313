"""RL over all scenarios: general prompts beside reasoning ones, judged by a reward model."""

import json
import re

import jax
import numpy as np
import pytest
import runs
from tiny import tiny_variables

from moe_rl import config as configs
from moe_rl.data import general
from moe_rl.data.pipeline import StepPrompts
from moe_rl.data.problem_files import DataError
from moe_rl.data.prompts import GENERAL_IDS, load_general
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.models.config import from_fields
from moe_rl.rl.rewards import pool, terms, verdicts
from moe_rl.rl.rewards.extract import format_reward, summary, thinking
from moe_rl.rl.rewards.language import of_question, share
from moe_rl.runtime.run import Run
from moe_rl.runtime.state import TrainState
from moe_rl.stages import rl

# The procedural source.


def test_good_answers_count_completely_in_order_spaced_in_the_language_of_the_question():
  assert general.asked('count from 3 to 6').answer == 'three four five six'
  assert general.asked('从5数到3').answer == '五 四 三'
  for counting in general.ALL:
    assert general.quality(counting.question, counting.answer) == 1
    language = of_question(counting.question)
    assert language == counting.language and share(counting.thought, language) == 1


@pytest.mark.parametrize('answer, virtues', [
  ('three four five six', 4), ('three five six', 3), ('three four five six seven', 3), ('three four four five six', 2),
  ('four three five six', 3), ('threefourfivesix', 3), ('三 四 五 六', 3), ('三六五', 0), ('', 0), ('no', 0)])
def test_quality_counts_the_virtues(answer, virtues):
  assert general.quality('count from 3 to 6', answer) == virtues / 4


def test_the_chosen_answer_has_more_virtues_and_is_no_longer_on_the_whole():
  tokenizer, pairs = load_tokenizer('tiny'), general.preference_pairs(0, 1000)
  answers = [[summary(p[key]) for key in ('chosen', 'rejected')] for p in pairs]
  virtues = [[general.quality(p['question'], a) for a in both] for p, both in zip(pairs, answers, strict=True)]
  virtues = np.array(virtues)
  assert (virtues[:, 0] > virtues[:, 1]).all() and (virtues[:, 0] < 1).any() and (virtues[:, 1] > 0.5).any()
  longer = np.array([len(tokenizer.encode(a)) - len(tokenizer.encode(b)) for a, b in answers if b])
  # Empty answers aside, two tokens of some 17 at most: the language is the only fault that makes lengths differ much.
  assert abs(longer.mean()) < 2


def test_traces_are_well_formed_short_and_addressed_by_seed_and_index():
  tokenizer, traces = load_tokenizer('tiny'), general.general_traces(0, 300)
  for trace in traces:
    assert format_reward(trace['response']) == 1 and thinking(trace['response'])
    assert general.quality(trace['question'], summary(trace['response'])) == 1
  assert max(len(tokenizer.encode(t['response'])) + 1 for t in traces) <= 48  # of the 72 of experiments/r1_zero.py
  assert general.general_traces(0, 20) == traces[:20] != general.general_traces(1, 20)
  prompts = [p['question'] for p in general.general_prompts(0, 2 * len(general.ALL))]
  assert len(set(prompts[:len(general.ALL)])) == len(general.ALL) and len(prompts) == 2 * len(general.ALL)


def test_the_command_writes_three_files(tmp_path, capsys):
  assert general.main([f'--out={tmp_path / "g"}', '--traces=3', '--pairs=4', '--prompts=5']) == 0
  found = {path.stem: runs.lines(path) for path in (tmp_path / 'g').iterdir()}
  assert {name: len(lines) for name, lines in found.items()} == {'general': 3, 'pairs': 4, 'prompts': 5}
  assert list(found['pairs'][0]) == ['question', 'chosen', 'rejected'] and list(found['prompts'][0]) == ['question']
  (tmp_path / 'file').write_text('')
  assert general.main([f'--out={tmp_path / "file" / "g"}']) == 2
  assert 'cannot be written' in capsys.readouterr().err


# Mixing.


def test_general_prompts_take_their_share_of_a_step_from_their_step_on_and_go_on_where_they_were():
  def made():
    return StepPrompts(list(range(100)), 6, 0, [f'g{i}' for i in range(9)], 2, start=2, general_seed=0)
  data = made()
  steps = [data.take(step) for step in range(4)]
  assert [sum(isinstance(x, str) for x in batch) for batch in steps] == [0, 0, 2, 2]
  assert all(isinstance(x, str) for batch in steps[2:] for x in batch[-2:])
  task = [x for batch in steps for x in batch if not isinstance(x, str)]
  assert len(set(task)) == len(task) == 20  # none is lost where a step takes fewer
  state = json.loads(json.dumps(data.get_state()))
  wanted, again = [data.take(step) for step in range(4, 9)], made()
  again.set_state(state)
  assert [again.take(step) for step in range(4, 9)] == wanted


def test_a_step_without_general_prompts_has_the_tasks_in_their_order():
  data = StepPrompts(list(range(10)), 4, None)
  assert [data.take(i) for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
  assert data.get_state()['general'] is None


# The reward.


def test_a_general_prompt_earns_model_format_and_language_and_a_reasoning_prompt_its_rules_and_language():
  weighted = terms.parse('accuracy=1,format=0.5,language=0.25,model=2,length=1')
  grade = pool.Grade
  grades = [grade('correct', 1.0, 1.0, 0, (1.0,)), grade('wrong', 0.0, 1.0, 0, (0.0,)),
            grade('open', 0.0, 1.0, 0, (1.0,)), grade('timeout', 0.0, 0.0, 0, (0.0,))]
  tokens = np.array([[4, 8], [3, 9]])
  got = terms.rewards(weighted, grades, tokens, 10, np.array([[0, 0], [0.5, -1.5]], np.float32))
  np.testing.assert_allclose(got.reward, [[1 + 0.5 + 0.25 + 0.5, 0.5 - 0.5], [0.5 + 0.25 + 1, -3]], rtol=1e-6)
  assert got.kept.all()
  is_open = terms.open_prompts(grades, (2, 2))
  assert is_open.tolist() == [False, True]
  means = terms.means(got.scores, is_open)
  assert (means['accuracy'], means['model'], means['format']) == (0.5, -0.5, 0.75)
  assert 'model' not in terms.means(got.scores, np.array([False, False]))


def test_open_prompts_go_through_the_workers_and_are_counted_by_a_name_of_their_own():
  items = [pool.Item('open', '<think>up</think><answer>one two</answer>', '', ('language:en',)),
           pool.Item('integer', '<think></think><answer>3</answer>', '3')]
  with pool.RewardPool(1) as graders:
    grades = graders.grade(items)
  assert (grades[0].verdict, grades[0].accuracy, grades[0].format, grades[0].scores) == ('open', 0.0, 1.0, (1.0,))
  counts = pool.count_verdicts(grades)
  assert counts['open'] == counts['correct'] == 1 and sum(counts.values()) == 2
  assert set(pool.count_verdicts(grades[1:])) == set(verdicts.VERDICTS)  # not there where nothing is open


# The run.

CHANGES = {
  'model': runs.MODEL, 'task': runs.TASK, 'init_from': '',
  'rl': dict(steps=4, prompts_per_step=4, group_size=4, general_share=0.5, general_from=2, row_tokens=48,
             microbatch_rows=4),
  'sampling': dict(max_prompt_tokens=24, max_new_tokens=7), 'eval': dict(every=0, problems=8, samples=2),
  'rewards': dict(weights='accuracy=1,format=0.1,language=0.1,model=1'), 'checkpoint': dict(every=2),
  'optim': dict(lr=1e-2)}


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
  """The workdir of a reward model that never was trained: random weights, so that its numbers differ."""
  path = tmp_path_factory.mktemp('judge') / 'run'
  config = runs.config_of('reward_model.py', {'model': runs.MODEL | dict(init_std=0.3), 'init_from': ''})
  run = Run(config, path)
  run.restore(None)
  variables = tiny_variables(from_fields(config.model.to_dict()))
  params = jax.tree.map(jax.numpy.asarray, variables['params'])
  run.save(1, TrainState(jax.numpy.int32(1), params, variables['router'], {'m': params}, {}), {})
  run.close()
  return path


def config_of(folder, judge, **changes):
  path = folder / 'prompts.jsonl'
  path.write_text(''.join(json.dumps(p) + '\n' for p in general.general_prompts(0, 12)))
  config = runs.config_of('r1_zero.py', CHANGES)
  config.task.general_path, config.rewards.model = str(path), str(judge)
  config.update(changes)
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory, judge, mesh):
  folder = tmp_path_factory.mktemp('general')
  config = config_of(folder, judge)
  return config, folder / 'run', rl.run(config, folder / 'run', mesh)


def test_metrics_tell_general_prompts_apart_from_the_step_on_at_which_they_come(trained):
  _, workdir, summary = trained
  steps = runs.metrics(workdir)
  apart = ('reward/general_mean', 'length/general', 'reward/model', 'verdict/open')
  assert [sum(key in step for key in apart) for step in steps] == [0, 0, 4, 4]
  assert [step.get('verdict/open') for step in steps] == [None, None, 8, 8]
  for step in steps:
    assert sum(v for k, v in step.items() if k.startswith('verdict/')) == 16
    assert 0 <= step['reward/accuracy'] <= 1 and np.isfinite(step['train/loss'])
  assert sum(summary['verdicts'].values()) == summary['samples'] == 64 and summary['verdicts']['open'] == 16
  # Random answers are neither right nor well-formed: what tells general ones apart is the model's number alone.
  assert steps[-1]['reward/model'] != 0 and steps[-1]['train/grad_norm'] > 0


def test_a_run_with_general_prompts_that_was_stopped_and_gone_on_with_is_the_run_that_was_not(
    trained, tmp_path, mesh, monkeypatch):
  config, workdir, summary = trained
  logged = Run.log

  def stop_at_three(self, step, *rest):
    logged(self, step, *rest)
    self.stop_requested |= step == 3
  monkeypatch.setattr(Run, 'log', stop_at_three)
  assert not rl.run(config, tmp_path / 'run', mesh)['complete']
  monkeypatch.undo()
  clocks = {'seconds': 0, 'costs': 0}
  assert rl.run(config, tmp_path / 'run', mesh) | clocks == summary | clocks
  assert runs.metrics(tmp_path / 'run') == runs.metrics(workdir)
  assert runs.restored(tmp_path / 'run')[1]['data'] == runs.restored(workdir)[1]['data']


def test_the_judging_programs_are_listed(trained, mesh):
  config = configs.with_lengths(trained[0], 24)
  assert [p.name for p in rl.RL(config, mesh).programs() if 'reward' in p.name] == ['reward model 64']


# Bad input.


def test_general_prompts_that_cannot_be_used_are_refused(tmp_path, judge):
  tokenizer = load_tokenizer('tiny')
  config = config_of(tmp_path, judge)
  found = load_general(config, tokenizer)
  assert len(found.prompts) == 12 and found.longest <= 24
  assert [p.problem.id for p in found.prompts][:2] == [GENERAL_IDS, GENERAL_IDS + 1]
  path = tmp_path / 'prompts.jsonl'
  path.write_text('{"question": "ok"}\n{"prompt": "x"}\n')
  with pytest.raises(DataError, match=re.escape(f"{path}:2: field 'question' is missing (the record has 'prompt')")):
    load_general(config, tokenizer)
  path.write_text('{"question": "ok"}\n' + json.dumps({'question': 'long ' * 20}) + '\n')
  with pytest.raises(ValueError, match=r'1 general prompts of up to 24 tokens, and a step takes 2 .*: add prompts'):
    load_general(config, tokenizer)


def test_a_reward_model_that_is_none_is_refused_before_any_compile(tmp_path, mesh):
  config = config_of(tmp_path, 'embedded')
  with pytest.raises(ValueError, match="'embedded': not a reward model: give the workdir of a run"):
    rl.run(config, tmp_path / 'run', mesh)
  assert not (tmp_path / 'run' / 'config.json').exists()
