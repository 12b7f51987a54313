"""A run with what the default leaves off: refilled groups, cut answers left out, the trainer's old log-probs with
importance weights, and routing replay, over two minibatches and two epochs a rollout."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import runs
from test_resume import assert_same_run
from test_run import LOWER_THE_LIST

STEPS, ROUNDS, SAMPLES = 6, 2, 16  # a round: 4 prompts x 4 samples


def changes() -> dict:
  base = runs.rl_changes()
  return base | {
    'rl': base['rl'] | dict(steps=STEPS, objective='dapo', kl_weight=1e-3, refill_rounds=ROUNDS, epochs=2,
                            old_logp='trainer', importance='truncate', replay_routing=True),
    'eval': dict(every=0, problems=8, samples=2), 'checkpoint': dict(every=2, keep=3)}


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[pathlib.Path, str]:
  path = tmp_path_factory.mktemp('refill') / 'run'
  return path, runs.finish(runs.start('r1_zero.py', changes(), path)).stdout


def test_the_chosen_objective_is_printed_with_the_keys_that_change_it(trained):
  line = next(line for line in trained[1].splitlines() if line.split()[:1] == ['objective'])
  assert line.split(None, 1)[1] == (
    'dapo: advantage group_std, ratio by token in 0.8..1.28 (clip), mean by token, KL k3 x 0.001 in the loss, '
    'refill_rounds 2, overlong_filter True')


def test_what_was_sampled_is_used_or_counted_as_unused(trained):
  lines, summary = runs.metrics(trained[0]), runs.summary(trained[0])
  rounds = np.array([line['treated/rounds'] for line in lines])
  unused = np.array([line['treated/unused_samples'] for line in lines])
  assert len(lines) == STEPS and rounds.min() >= 1 and 1 < rounds.max() <= 1 + ROUNDS  # some step was refilled
  np.testing.assert_array_equal(unused, (rounds - 1) * SAMPLES)
  assert summary['unused_samples'] == unused.sum() > 0
  assert summary['samples'] == sum(summary['verdicts'].values()) == rounds.sum() * SAMPLES
  for line in lines:
    groups = 4 * line['treated/rounds']
    untied = groups - round(line['reward/tied_groups'] * groups)
    # It stops once four groups differ, and fills up with tied ones after the last round only.
    assert line['treated/tied_groups_used'] == max(0, 4 - untied)
    assert untied >= 4 or line['treated/rounds'] == 1 + ROUNDS


def test_cut_answers_are_left_out_of_the_loss_and_counted(trained):
  lines = runs.metrics(trained[0])
  left_out = [line['treated/left_out_samples'] for line in lines]
  assert runs.summary(trained[0])['left_out_samples'] == sum(left_out) > 0
  for line in lines:  # of those used, so never more than were cut
    assert line['treated/left_out_samples'] <= round(line['length/truncated'] * SAMPLES * line['treated/rounds'])


def test_sampler_and_trainer_agree_at_the_weights_that_sampled(trained):
  for line in runs.metrics(trained[0]):
    assert 0 < line['train/sampler_gap'] <= 1e-4  # law 1
    assert line['train/importance'] == pytest.approx(1, abs=1e-4) and line['train/importance_cut'] == 0
  # Later updates of a rollout, to which ratio and clip belong, have moved away from those weights.
  assert max(abs(line['train/ratio'] - 1) for line in runs.metrics(trained[0])) > 1e-4


def test_a_run_that_goes_on_from_a_checkpoint_draws_the_same_prompts_and_ends_the_same(trained, tmp_path):
  again = tmp_path / 'again'
  shutil.copytree(trained[0], again)
  (again / 'summary.json').unlink()
  assert runs.checkpoints(again) == [2, 4, 6]
  for step in (4, 6):
    shutil.rmtree(again / 'checkpoints' / str(step))
  done = runs.finish(runs.start('r1_zero.py', changes(), again))
  assert 'resumed at step 2' in done.stdout
  assert_same_run(again, trained[0])


def test_its_programs_are_listed_and_are_those_that_ran(trained):
  found = runs.start_python(LOWER_THE_LIST, 'r1_zero', json.dumps(changes()))
  found = json.loads(runs.finish(found).stdout)
  assert sorted({*found} - {'weights to sampler'}) == ['GRPO update', 'evaluation', 'init', 'rollout', 'scoring']
  assert all(entry == {'hits': 1, 'misses': 0, 'memory': True} for entry in found.values()), found


def test_nothing_is_compiled_after_the_second_step(trained):
  compiles = [line['time']['seconds/compiles'] for line in runs.lines(trained[0] / 'metrics.jsonl')]
  assert 0 < compiles[1] == compiles[-1]
