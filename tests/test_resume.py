"""Law 4: a run that is killed, or told to stop, and started again in a fresh process equals one that was left alone.

Equal means bit for bit: the same programs run on the same bytes, so there is no tolerance anywhere in this file.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from moe_rl.config import base_config
from moe_rl.runtime.run import Run
from moe_rl.runtime.state import TrainState


def interrupt(process, workdir, number: int, step: int) -> int:
  """Sends a signal once `step` is logged and a checkpoint is whole; returns the exit code."""
  def far_enough():
    done = runs.metrics(workdir)
    return runs.checkpoints(workdir) and done and done[-1]['step'] >= step
  runs.wait_until(far_enough, process)
  process.send_signal(number)
  process.communicate(timeout=runs.LIMIT_S)
  return process.returncode


def assert_same_run(actual, wanted):
  """Every number that two workdirs hold, but for clocks and paths."""
  assert runs.metrics(actual) == runs.metrics(wanted)  # holds sample_crc, the checksum of all sampled ids
  assert runs.lines(actual / 'evaluations.jsonl') == runs.lines(wanted / 'evaluations.jsonl')
  assert without_clocks(runs.summary(actual)) == without_clocks(runs.summary(wanted))
  (state, host), (wanted_state, wanted_host) = runs.restored(actual), runs.restored(wanted)
  assert without_clocks(host) == without_clocks(wanted_host)
  assert state.keys() == wanted_state.keys()
  for name, leaf in wanted_state.items():
    assert state[name].dtype == leaf.dtype and state[name].tobytes() == leaf.tobytes(), name


def without_clocks(record: dict) -> dict:
  kept = {k: v for k, v in record.items() if k not in ('seconds', 'base', 'costs')}
  work = {name: (part['flops'], part['tokens']) for name, part in record.get('costs', {}).items()}
  return kept | {'work': work}


@dataclasses.dataclass(frozen=True)
class Interrupted:
  """A run told to stop, gone on with, killed, damaged as a crash may damage it, and run to its end.

  code, stopped, saved, logged: what SIGTERM left: exit code, summary, newest checkpoint, last line of metrics.jsonl;
  resumed: the step that the last process went on from.
  """

  workdir: pathlib.Path
  code: int
  stopped: dict
  saved: int
  logged: int
  resumed: int


def interrupt_rl(workdir) -> Interrupted:
  """The last process compiles everything anew: the claim is not that of a compilation cache."""
  code = interrupt(runs.start('r1_zero.py', runs.rl_changes(), workdir), workdir, signal.SIGTERM, 3)
  left = runs.summary(workdir), runs.checkpoints(workdir)[-1], runs.metrics(workdir)[-1]['step']
  again = runs.start('r1_zero.py', runs.rl_changes(), workdir)
  assert interrupt(again, workdir, signal.SIGKILL, left[2] + 4) == -signal.SIGKILL
  newest = runs.checkpoints(workdir)[-1]
  with (workdir / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 28, "reward/mean": 0.0937500')  # cut in mid-number
  half = workdir / 'checkpoints' / f'{newest + 2}.orbax-checkpoint-tmp'
  shutil.copytree(workdir / 'checkpoints' / str(newest) / 'host', half / 'host', dirs_exist_ok=True)
  done = runs.finish(runs.start('r1_zero.py', runs.rl_changes(), workdir, cached=False))
  return Interrupted(workdir, code, *left, int(re.search(r'resumed at step ([1-9]\d*)', done.stdout)[1]))


def interrupt_pretraining(workdir) -> pathlib.Path:
  """The workdir of a pre-training run that was killed and run to its end."""
  process = runs.start('pretrain.py', runs.PRETRAIN, workdir)
  assert interrupt(process, workdir, signal.SIGKILL, 23) == -signal.SIGKILL
  assert not (workdir / 'base.safetensors').exists()
  runs.finish(runs.start('pretrain.py', runs.PRETRAIN, workdir))
  return workdir


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """Both stages interrupted, side by side, since a start is mostly work of one core."""
  folder = tmp_path_factory.mktemp('interrupted')
  runs.trained()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    rl = pool.submit(interrupt_rl, folder / 'rl')
    pretraining = pool.submit(interrupt_pretraining, folder / 'pretrain')
  return rl.result(), pretraining.result()


@pytest.fixture(scope='module')
def interrupted(both) -> Interrupted:
  return both[0]


def test_the_run_under_test_learns():
  """Without this the claims below would be about weights that never move."""
  steps = runs.metrics(runs.trained()[0])
  assert sum(s['train/grad_norm'] > 0.1 for s in steps) >= 5
  state, _ = runs.restored(runs.trained()[0])
  reference = {k: v for k, v in state.items() if k.startswith("['reference']")}
  # The reference was taken at step 27, the run ended at 29.
  assert len(reference) > 10
  assert all(not np.array_equal(v, state[k.replace('reference', 'params')]) for k, v in reference.items())
  assert any(np.abs(v).max() > 0 for k, v in state.items() if k.startswith("['router']"))


def test_rl_stopped_killed_and_resumed_equals_uninterrupted(interrupted):
  assert_same_run(interrupted.workdir, runs.trained()[0])


def test_after_a_kill_no_checkpoint_is_left_half_written(interrupted):
  names = [p.name for p in (interrupted.workdir / 'checkpoints').iterdir()]
  assert sorted(names) == ['28', '29']  # checkpoint.keep is 2


def test_a_resumed_run_compiles_nothing_after_its_second_step_but_its_evaluation(interrupted):
  """The reference is refreshed every third step: moving it compiles nothing either."""
  lines = runs.lines(interrupted.workdir / 'metrics.jsonl')
  compiles = [line['time']['seconds/compiles'] for line in lines][interrupted.resumed + 1:]
  assert len(compiles) > 5 and compiles[-1] - compiles[0] <= 1  # one program of held-out evaluation


def test_after_a_kill_every_step_is_on_tensorboard_once(interrupted):
  board, wanted = runs.events(interrupted.workdir), runs.metrics(interrupted.workdir)
  every_step = list(range(1, 30))
  losses = board.Scalars('train/loss')
  assert runs.steps_of(losses) == every_step
  np.testing.assert_allclose([e.value for e in losses], [m['train/loss'] for m in wanted], rtol=1e-6)  # float32
  assert runs.steps_of(board.Histograms('length/tokens')) == every_step
  assert runs.steps_of(board.Scalars('eval/pass_1')) == [0, 10, 20, 29]
  assert runs.steps_of(board.Tensors('transcripts/text_summary')) == [5, 10, 15, 20, 25]


def test_rl_told_to_stop_finishes_its_step_saves_and_ends_well(interrupted):
  assert interrupted.code == 0
  assert not interrupted.stopped['complete'] and interrupted.stopped['steps'] < 25
  assert interrupted.saved == interrupted.logged == interrupted.stopped['steps']


def test_pretraining_killed_and_resumed_writes_the_same_base(both):
  workdir, wanted = both[1], runs.pretrained()[0]
  assert (workdir / 'base.safetensors').read_bytes() == (wanted / 'base.safetensors').read_bytes()
  assert_same_run(workdir, wanted)


@pytest.mark.parametrize('stage', ['pretrain', 'rl'])
def test_a_complete_run_started_again_changes_nothing_and_prints_its_summary(stage):
  experiment, changes, (workdir, _) = {
    'pretrain': ('pretrain.py', runs.PRETRAIN, runs.pretrained()),
    'rl': ('r1_zero.py', runs.rl_changes(), runs.trained())}[stage]
  before = contents(workdir)
  done = runs.finish(runs.start(experiment, changes, workdir))
  assert contents(workdir) == before
  assert json.loads(done.stdout[done.stdout.index('{'):]) == runs.summary(workdir)


def contents(folder) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def small_state(reference: dict) -> TrainState:
  params = {'a': jnp.arange(3.0), 'b': {'c': jnp.ones((2, 2))}}
  return TrainState(jnp.int32(7), params, {}, optax.adamw(1e-3).init(params), reference)


def test_a_state_without_reference_or_router_is_saved_and_restored(tmp_path):
  run = Run(base_config(), tmp_path / 'run')
  assert not run.begun and run.restore(small_state({})) is None
  run.save(2, small_state({}), {'data': {'next_index': 4}})
  run.close()
  run = Run(base_config(), tmp_path / 'run')
  step, state, host = run.restore(jax.eval_shape(lambda: small_state({})))
  run.close()
  assert (step, host) == (2, {'data': {'next_index': 4}})
  jax.tree.map(np.testing.assert_array_equal, dataclasses.asdict(state), dataclasses.asdict(small_state({})))


def test_lines_after_the_checkpoint_are_taken_back_and_those_before_it_kept(tmp_path):
  run = Run(base_config(), tmp_path / 'run')
  run.restore(small_state({}))
  for step in (1, 2, 3):
    run.log(step, {'loss': step / 2}, {'rate': 1.0})
    if step == 2:
      run.save(step, small_state({}), {})
  run.close()
  run = Run(base_config(), tmp_path / 'run')
  run.restore(jax.eval_shape(lambda: small_state({})))
  run.close()
  assert runs.metrics(tmp_path / 'run') == [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': 1.0}]
