"""Several hosts: the same numbers as one process, a host that does not come, a host that is killed, and the way back.

Real processes over loopback, 2 of 4 CPU devices each, through the real main.
"""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs

from moe_rl import validation
from moe_rl.config import minibatches_of_samples
from moe_rl.runtime import hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # ten starts of the program on hosts: five minutes
MODEL = runs.MODEL | dict(max_length=128)
# What needs numbers of the whole step: whitened advantages over groups that were sampled again, cut answers left out,
# the trainer's log-probs with weights for their gap, replayed experts; two minibatches and a reference that moves.
WHOLE_STEP = dict(prompts_per_step=16, group_size=4, minibatches=2, row_tokens=48, microbatch_rows=8, bias_rate=1e-3,
                  reference_every=2, kl_weight=1e-3, objective='dapo', advantage='group_batch_std', refill_rounds=2,
                  old_logp='trainer', importance='truncate', replay_routing=True)
OPTIM = dict(lr=1e-4, final_lr=1e-4)
STEPS = 6  # of RL: time enough to be caught twice
PROMPTS = 41, 10  # that are sampled and evaluated, 8 at once: in the last batch there are too few for each host
NEVER = 'pretrain.py', {}  # has begun when the hosts do not meet
LIST = '../tests/data/hosts_pipeline.py'
SAMPLING = dict(max_prompt_tokens=24, max_new_tokens=7)
PRETRAIN = {'model': runs.MODEL | dict(init_std=0.15), 'task': runs.TASK, 'optim': dict(lr=1e-3, warmup_steps=0),
            'pretrain': dict(steps=3, rows_per_step=32, row_tokens=48, microbatch_rows=16)}
RL = {'model': MODEL, 'task': runs.TASK, 'optim': OPTIM, 'sampling': SAMPLING, 'checkpoint': dict(every=1),
      'eval': dict(every=0, problems=18, samples=2),
      'rl': WHOLE_STEP | dict(steps=STEPS, general_share=0.25, general_from=1),
      'rewards': dict(weights='accuracy=1,format=0.1,language=0.1,model=0.1')}


def stages_list():
  """All that a stage may do on several hosts, in sizes that 8 devices divide."""
  # Rewards of random weights are all 0, and then no weight moves.
  base, answers, (asked, evaluated) = str(runs.pretrained()[0]), SAMPLING | dict(batch_samples=32), PROMPTS
  return LIST, {
    'evaluation': dict(task=runs.TASK, sampling=answers, eval=dict(problems=evaluated, samples=4)),
    'stages': {
      'base': PRETRAIN, 'general': {'general_data': dict(traces=4, pairs=48, prompts=16)},
      'traces': dict(model=MODEL, task=runs.TASK, init_from=base, sampling=answers,
                     sample=dict(prompts=asked, samples=4, min_language=0)),
      'tuned': dict(model=MODEL, init_from=base, optim=OPTIM,
                    sft=dict(epochs=20, rows_per_step=16, row_tokens=48, microbatch_rows=8)),
      'taste': dict(model=MODEL, optim=OPTIM, reward_model=dict(examples_per_step=16, held_out=8, row_tokens=128,
                                                                microbatch_rows=8)),
      'final': RL}}


def last_stage(path: pathlib.Path):
  """RL by itself, from what the list in `path` has made."""
  return f'{LIST}:final', RL | {
    'init_from': str(path / 'tuned'), 'rewards': RL['rewards'] | dict(model=str(path / 'taste')),
    'task': runs.TASK | dict(general_path=str(path / 'general' / 'prompts.jsonl'))}

# The real main, where one process deals minibatches out as more hosts than a minibatch has prompts must.
BY_SAMPLES = """
import runpy
from moe_rl import config
config.minibatches_of_samples = lambda config, processes: True
runpy.run_module('moe_rl.main', run_name='__main__', alter_sys=True)
"""
# Two processes with four devices each, or one with eight, save a fresh state and restore the others' on their meshes.
RESTORED = """
import json, pathlib, sys, time
import jax, numpy as np
from moe_rl import config as configs
from moe_rl.main import load_experiment
from moe_rl.runtime import hosts
from moe_rl.runtime.mesh import AXES, make_mesh
from moe_rl.runtime.run import Run
from moe_rl.stages.pretrain import Pretraining

folder, coordinator, process = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
own, other = ('two', 'one') if coordinator else ('one', 'two')
hosts.connect(hosts.Place(coordinator, 2, process) if coordinator else None)

def stage_on(*sizes):
  config = load_experiment('experiments/pretrain.py')
  config.update(CHANGES)
  config.mesh.update(dict(zip(AXES, sizes)))
  return Pretraining(config, make_mesh(dict(zip(AXES, sizes)), jax.devices()[:int(np.prod(sizes))]))

meshes = [(1, 2, 2, 2)] if coordinator else [(1, 1, 1, 1), (8, 1, 1, 1), (2, 4, 1, 1), (1, 2, 2, 2)]
first = stage_on(*meshes[0])
run = Run(first.config, folder / own)
assert run.restore(first.abstract) is None
run.save(1, first.init(), {})
run.close()
if process == 0:
  (folder / f'{own}.done').touch()
while not (folder / f'{other}.done').exists():
  time.sleep(0.05)
differing = {}
for sizes in meshes:
  stage = stage_on(*sizes)
  run = Run(stage.config, folder / other)
  _, got, _ = run.restore(stage.abstract)
  run.close()
  # The same seed gives the same bits on every mesh, which a comparison with them shows as well.
  differing[f'{other} > {own} {sizes}'] = sum(
    int((np.asarray(a.data) != np.asarray(b.data)).sum()) for x, y in zip(
      jax.tree.leaves(got), jax.tree.leaves(stage.init()), strict=True)
    for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True))
every = hosts.gather(differing)
if process == 0:
  (folder / f'{own}.json').write_text(json.dumps({k: sum(e[k] for e in every) for k in differing}))
""".replace('CHANGES', repr(PRETRAIN))


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def command(stage, workdir, *more: str) -> list[str]:
  experiment, changes = stage
  return [sys.executable, '-m', 'moe_rl.main', f'--config=experiments/{experiment}', *runs.flags(changes),
          f'--workdir={workdir}', *more]


def start_host(stage, workdir, port: int, process: int, *, processes: int = 2, wait: int = 300):
  place = (f'--coordinator=127.0.0.1:{port}', f'--processes={processes}', f'--process={process}', f'--wait={wait}')
  return subprocess.Popen(
    command(stage, workdir, *place), cwd=runs.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    env=runs.environment(devices=4))


def start_both(stage, workdir):
  port = free_port()
  return [start_host(stage, workdir, port, process) for process in range(2)]


def restored(workdir: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
  """(state by flat name, host record) of the newest checkpoint as numpy arrays, whatever devices it was saved from."""
  folder = workdir.absolute() / 'checkpoints' / str(runs.checkpoints(workdir)[-1])
  with ocp.PyTreeCheckpointer() as checkpointer:
    shapes = checkpointer.metadata(folder / 'state').item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    state = checkpointer.restore(folder / 'state', restore_args=as_numpy)
  flat = jax.tree_util.tree_leaves_with_path(state)
  record = json.loads((folder / 'host' / 'metadata').read_text())
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}, record


@pytest.fixture(scope='module')
def listed(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
  """(workdir of one process with one device, workdir of two with four each) of the same list of stages."""
  path = tmp_path_factory.mktemp('list')
  runs.finish(runs.start(*stages_list(), path / 'one'))
  for host in start_both(stages_list(), path / 'two'):
    runs.finish(host)
  return path / 'one', path / 'two'


def assert_same_training(one: pathlib.Path, two: pathlib.Path, loss: str = 'loss') -> list[dict]:
  """Loss of every step and weights of the last one; returns the first run's metrics."""
  lines = runs.metrics(one)
  for a, b in zip(lines, runs.metrics(two), strict=True):
    assert a.keys() == b.keys()
    # The RL loss is a difference: advantages of size 1 cancel, hence the absolute part.
    np.testing.assert_allclose(b[loss], a[loss], rtol=1e-5, atol=1e-6 if loss == 'train/loss' else 0)
  first, second = (restored(path)[0] for path in (one, two))
  assert first.keys() == second.keys()
  for name, wanted in first.items():
    if 'params' in name or 'router' in name:
      # 1e-5 of the largest entry: float32 sums in another order.
      np.testing.assert_allclose(second[name], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name)
  return lines


def test_two_processes_pretrain_as_one_does(listed):
  assert len(assert_same_training(*(path / 'base' for path in listed))) == 3


def test_two_processes_fine_tune_as_one_does(listed):
  one, two = listed
  assert len(assert_same_training(one / 'tuned', two / 'tuned')) >= 2
  assert runs.summary(two)['stages']['tuned']['response_tokens'] > 0


def test_two_processes_sample_and_reinforce_as_one_does(listed):
  one, two = (path / 'final' for path in listed)
  lines = assert_same_training(one, two, 'train/loss')
  exact = {'sample_crc', 'length/mean', 'length/general', 'verdict/correct', 'verdict/open', 'cost/flops',
           'cost/tokens', 'treated/rounds', 'treated/unused_samples', 'treated/left_out_samples'}
  assert exact <= lines[-1].keys()
  for a, b in zip(lines, runs.metrics(two), strict=True):
    assert {k: a.get(k) for k in exact} == {k: b.get(k) for k in exact}
    for key in ('reward/mean', 'reward/model', 'reward/general_mean'):  # the reward model's numbers, to rounding
      np.testing.assert_allclose(b.get(key, 0), a.get(key, 0), rtol=1e-4, atol=1e-6)
    assert a['train/grad_norm'] > 1e-3 and a['reward/tied_groups'] < 1
  first, second = map(runs.summary, (one, two))
  for key in ('first', 'last', 'verdicts', 'samples', 'left_out_samples'):
    assert first[key] == second[key]


def test_two_processes_answer_and_select_as_one_does(listed):
  for name in ('traces/answers.jsonl', 'evaluations/final/answers.jsonl'):
    one, two = ((path / name).read_text() for path in listed)
    assert one == two and len(one.splitlines()) in [4 * prompts for prompts in PROMPTS]
  one, two = ([{k: v for k, v in trace.items() if k != 'source'} for trace in runs.lines(path / 'traces/traces.jsonl')]
              for path in listed)
  assert one == two and one


def test_two_processes_train_a_reward_model_as_one_does(listed):
  assert len(assert_same_training(*(path / 'taste' for path in listed))) >= 2
  one, two = (runs.summary(path)['stages']['taste'] for path in listed)
  assert one['steps'] == two['steps'] and one['tokens'] == two['tokens']
  np.testing.assert_allclose(two['last']['loss'], one['last']['loss'], rtol=1e-5)


def test_only_process_0_writes_beside_the_checkpoints(listed):
  for one, two in (listed, *(tuple(path / stage for path in listed) for stage in ('base', 'traces', 'final'))):
    assert {p.name for p in one.iterdir() if 'tfevents' not in p.name} == {
      p.name for p in two.iterdir() if 'tfevents' not in p.name}
    assert len(list(two.glob('*tfevents*'))) == len(list(one.glob('*tfevents*')))
    assert runs.summary(one).keys() == runs.summary(two).keys()


def test_two_processes_share_the_samples_of_each_prompt_where_a_minibatch_has_one(tmp_path):
  """Four minibatches of four prompts: each has a sample of every prompt, as one process deals them when told to,
  which has whole groups by itself."""
  changes = RL | {
    'init_from': str(runs.pretrained()[0]), 'rewards': dict(weights='accuracy=1,format=0.1,language=0.1'),
    'mesh': dict(data=1, fsdp=2, expert=2, tensor=2),
    'rl': dict(steps=2, prompts_per_step=4, group_size=4, minibatches=4, row_tokens=48, microbatch_rows=4,
               refill_rounds=4, kl_weight=1e-3)}
  alone = changes | {'mesh': dict(data=1, fsdp=1, expert=1, tensor=1)}
  one = runs.start_python(BY_SAMPLES, *command(('r1_zero.py', alone), tmp_path / 'one')[3:], devices=1)
  for process in (one, *start_both(('r1_zero.py', changes), tmp_path / 'two')):
    runs.finish(process)
  lines = assert_same_training(tmp_path / 'one', tmp_path / 'two', 'train/loss')
  crcs = [[line['sample_crc'] for line in runs.metrics(tmp_path / name)] for name in ('one', 'two')]
  assert crcs[0] == crcs[1] and len(lines) == 2 and lines[-1]['train/grad_norm'] > 1e-3


def test_a_checkpoint_of_two_processes_is_the_same_bits_on_one_and_the_other_way(tmp_path):
  port = free_port()
  hosts_ = [runs.start_python(RESTORED, tmp_path, f'127.0.0.1:{port}', i, devices=4) for i in range(2)]
  for process in (runs.start_python(RESTORED, tmp_path, '', 0, devices=8), *hosts_):
    runs.finish(process)
  differing = json.loads((tmp_path / 'one.json').read_text()) | json.loads((tmp_path / 'two.json').read_text())
  assert len(differing) == 5 and set(differing.values()) == {0}


def test_killed_hosts_stop_the_others_and_all_go_on_as_if_left_alone(listed, tmp_path):
  alone, path, begun = listed[1] / 'final', tmp_path / 'killed', 0
  for victim, step in ((1, 2), (0, 4)):
    both = start_both(last_stage(listed[1]), path)
    runs.wait_until(lambda: runs.checkpoints(path)[-1:] >= [step], both[victim])  # noqa: B023
    both[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    out, err = both[1 - victim].communicate(timeout=60)
    assert time.monotonic() - killed < 60 and both[1 - victim].returncode == 1
    assert f'error: process {victim} ({socket.gethostname()}' in err and 'is gone' in err
    assert f'process {1 - victim} stops too' in err and 'start the same command on all hosts again' in err
    assert ('resumed at step' in out) == bool(begun)
    both[victim].communicate()
    begun = step
  for host in start_both(last_stage(listed[1]), path):
    assert 'resumed at step' in runs.finish(host).stdout
  (wanted, record), (actual, again) = map(restored, (alone, path))
  for name in wanted:
    np.testing.assert_array_equal(actual[name], wanted[name], err_msg=name)
  assert again['data'] == record['data']
  assert runs.metrics(path) == runs.metrics(alone)


def test_a_host_that_hangs_stops_the_other_which_names_it(tmp_path):
  for_long = PRETRAIN | {'pretrain': PRETRAIN['pretrain'] | dict(steps=100_000)}
  both = start_both(('pretrain.py', for_long), tmp_path / 'run')
  runs.wait_until((tmp_path / 'run' / 'metrics.jsonl').exists, both[1])
  both[1].send_signal(signal.SIGSTOP)
  hung = time.monotonic()
  _, err = both[0].communicate(timeout=90)
  both[1].kill()
  both[1].communicate()
  assert 30 < time.monotonic() - hung < 60 and both[0].returncode == 1
  assert f'error: process 1 ({socket.gethostname()}' in err and 'has given no sign of life for 40 s' in err
  assert 'process 0 stops too' in err


def test_a_host_that_does_not_come_is_named_on_those_that_did(tmp_path):
  port = free_port()
  came = [start_host(NEVER, tmp_path / 'run', port, process, processes=3, wait=8) for process in (0, 2)]
  for done in map(runs.run_to_end, came):
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert f'error: process 1 of 3 did not come to 127.0.0.1:{port} within 8 s' in done.stderr
  assert not (tmp_path / 'run').exists()


def test_process_0_that_does_not_come_is_named_with_its_address(tmp_path):
  port = free_port()
  done = runs.run_to_end(start_host(NEVER, tmp_path / 'run', port, 1, wait=2))
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert f'error: process 0 of 2 was not to be reached at 127.0.0.1:{port} within 2 s' in done.stderr


@pytest.mark.parametrize('given, message', [
  (('10.0.0.1:1', 2, -1), 'give all three'), (('', 2, 0), 'give all three'), (('10.0.0.1', 2, 0), 'give HOST:PORT'),
  (('10.0.0.1:x', 2, 0), 'give HOST:PORT'), (('10.0.0.1:1', 2, 2), 'so at most 1')])
def test_flags_that_name_no_place_are_refused(given, message):
  with pytest.raises(ValueError, match=message):
    hosts.from_flags(*given)


@pytest.mark.parametrize('changes, message', [
  ({'mesh': dict(data=1, tensor=2)}, 'must be a multiple of 2, so that each has rows'),
  ({'rl': dict(prompts_per_step=48, minibatches=16)}, '48 is not a multiple of 2 processes x config.rl'),
  ({'rl': dict(prompts_per_step=16, general_share=0.2), 'task': dict(general_path='x')}, 'a multiple of 0.125')])
def test_sizes_that_leave_a_process_without_its_share_are_refused(changes, message):
  config = runs.config_of('r1_zero.py', changes)
  validation.validate(config, 2, 10, processes=1)
  with pytest.raises(ValueError, match=message):
    validation.validate(config, 2, 10, processes=2)


def test_more_hosts_than_a_minibatch_has_prompts_share_its_samples():
  config = runs.config_of('r1_zero.py', {'mesh': dict(data=4), 'rl': dict(prompts_per_step=4, group_size=4,
                                                                          minibatches=4)})
  validation.validate(config, 4, 10, processes=4)
  assert minibatches_of_samples(config, 4) and not minibatches_of_samples(config, 1)
  config.rl.group_size = 6
  with pytest.raises(ValueError, match='4 is not a multiple of 4 processes x config.rl.minibatches: 16'):
    validation.validate(config, 4, 10, processes=4)


def test_flags_name_a_place_and_none_is_none():
  assert hosts.from_flags('', 0, -1) is None
  assert hosts.from_flags('h:8', 2, 1) == hosts.Place('h:8', 2, 1)


def test_a_tpu_pod_is_found_and_a_single_host_is_none():
  assert hosts.from_tpu({'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}) is None
  assert hosts.from_tpu({'TPU_WORKER_HOSTNAMES': 'a', 'TPU_WORKER_ID': '0'}) is None
  assert hosts.from_tpu({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}) == hosts.Place('a:8476', 2, 1)
  pod = {'worker-network-endpoints': 'x:8470:10.0.0.2,y:8470:10.0.0.3', 'agent-worker-number': '1'}
  assert hosts.from_tpu({}, pod.get) == hosts.Place('10.0.0.2:8476', 2, 1)
  assert hosts.from_tpu({}, {'worker-network-endpoints': 'x:8470:10.0.0.2', 'agent-worker-number': '0'}.get) is None
  slices = {'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '1', 'MEGASCALE_COORDINATOR_ADDRESS': 'c:8080'}
  assert hosts.from_tpu(slices, pod.get) == hosts.Place('c:8476', 4, 3)


def test_rows_are_dealt_out_evenly_in_each_part_and_only_the_surplus_moves():
  home = np.array([0, 0, 0, 1, 1, 1, 1, 1])
  owner = hosts.owners(home, 2, 2)
  np.testing.assert_array_equal(owner, [0, 0, 1, 1, 1, 1, 0, 0])  # of each half two; 1 and 2 too many were at one
  np.testing.assert_array_equal(hosts.owners(np.arange(8) % 4, 4, 2), np.arange(8) % 4)


def test_with_one_process_nothing_is_changed_or_waited_for():
  rows = {'a': np.arange(6).reshape(3, 2)}
  hosts.connect(None)
  hosts.connect(hosts.Place('192.0.2.1:1', 1, 0))  # nobody is there, and nobody is asked
  assert hosts.gather_rows(rows) is rows and hosts.spread(rows, like=None) is rows and hosts.whole(rows) is rows
  assert hosts.checksum(rows['a']) == zlib.crc32(rows['a'].tobytes())
  np.testing.assert_array_equal(hosts.deal(rows, np.array([0, 2]), 1)['a'], rows['a'][[0, 2]])
  assert hosts.mine([1, 2]) == [1, 2] and hosts.gather('x') == ['x'] and hosts.total({'k': 2}) == {'k': 2}
  assert not hosts.connected()
