"""Shared by tests: the real program in a process of its own, small enough that a whole run takes seconds.

Runs that several tests look at are made once a session: `pretrained` and `trained`.
"""

import fcntl
import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from session import scratch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_rl.main import load_experiment

ROOT = pathlib.Path(__file__).parents[1]
MODEL = dict(width=32, heads=2, layers=2, experts=4, expert_ff=16, dense_ff=32, kv_lora=16, nope_dim=8, rope_dim=4,
             v_dim=8, max_length=64)
TASK = dict(min_terms=2, max_terms=3, max_total=18)
# 60 steps of these teach the form of an answer, so that rewards differ within a group and RL has gradients.
PRETRAIN = {
  'model': MODEL, 'task': TASK, 'corpus': dict(direct=0.98, steps=0.0, malformed=0.02),
  'optim': dict(lr=0.02, warmup_steps=10),
  'pretrain': dict(steps=60, rows_per_step=16, row_tokens=48, microbatch_rows=8), 'checkpoint': dict(every=20)}
# Two minibatches a rollout and a reference that moves: all that a resumed run has to bring back.
RL = {
  'model': MODEL, 'task': TASK, 'optim': dict(lr=1e-3, final_lr=1e-4),
  'rl': dict(steps=29, prompts_per_step=4, group_size=4, minibatches=2, reference_every=3, row_tokens=48,
             microbatch_rows=4, bias_rate=1e-3),
  'sampling': dict(max_prompt_tokens=16, max_new_tokens=7), 'eval': dict(every=10, problems=8, samples=2),
  'checkpoint': dict(every=2)}

_ANSWERS = {'model': MODEL, 'task': TASK, 'init_from': 'embedded',
            'sampling': dict(max_prompt_tokens=16, max_new_tokens=7)}
# The evaluation of RL above, alone; and samples of training prompts.
EVALUATE = _ANSWERS | {'eval': dict(problems=8, samples=2)}
REJECTION = _ANSWERS | {'sample': dict(prompts=12, samples=4)}


LIMIT_S = 550  # seconds a process may take; seconds suffice on a quiet machine


def flags(changes: dict, prefix: str = 'config') -> list[str]:
  """{'rl': {'steps': 3}} -> ['--config.rl.steps=3']."""
  out = []
  for key, value in changes.items():
    name = f'{prefix}.{key}'
    out += flags(value, name) if isinstance(value, dict) else [f'--{name}={value}']
  return out


def config_of(experiment: str, changes: dict):
  """The config that `flags(changes)` gives."""
  config = load_experiment(str(ROOT / 'experiments' / experiment))
  config.update(changes)
  return config


def environment(cached: bool = True, devices: int = 0, **more: str) -> dict[str, str]:
  """Of a program with some CPU devices, or as many as it makes, compiled as the tests are (session.py), with or without
  the cache."""
  xla_flags = os.environ.get('XLA_FLAGS', '')
  if devices:
    xla_flags += f' --xla_force_host_platform_device_count={devices}'
  return os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': xla_flags,
                       'JAX_ENABLE_COMPILATION_CACHE': str(cached).lower()} | more


def start(experiment: str, changes: dict, workdir, **env) -> subprocess.Popen:
  """`python -m moe_rl.main` on an experiment; output to pipes."""
  command = [sys.executable, '-m', 'moe_rl.main', f'--config=experiments/{experiment}', *flags(changes)]
  if workdir:
    command.append(f'--workdir={workdir}')
  return subprocess.Popen(command, cwd=ROOT, env=environment(**env), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
  """Waits for a run that must succeed."""
  done = run_to_end(process)
  assert done.returncode == 0, done.stdout + done.stderr
  return done


def run_to_end(process: subprocess.Popen) -> subprocess.CompletedProcess:
  out, err = process.communicate(timeout=LIMIT_S)
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def main(*arguments: str, **env) -> subprocess.CompletedProcess:
  """`python -m moe_rl.main` with the arguments as they are; it may fail."""
  return subprocess.run([sys.executable, '-m', 'moe_rl.main', *arguments], cwd=ROOT, env=environment(**env),
                        text=True, capture_output=True, timeout=LIMIT_S)


def start_python(code: str, *arguments, **env) -> subprocess.Popen:
  """A script of the tests in a process of its own; output to pipes."""
  return subprocess.Popen([sys.executable, '-c', code, *map(str, arguments)], cwd=ROOT, env=environment(**env),
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def once(name: str, experiment: str, changes: dict) -> tuple[pathlib.Path, str]:
  """(workdir, printed text) of a run that the first process of the session to ask for it makes."""
  path, printed = scratch() / name, scratch() / f'{name}.txt'
  with (scratch() / f'{name}.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not printed.exists():
      done = finish(start(experiment, changes, path))
      printed.write_text(done.stdout)
  return path, printed.read_text()


@functools.cache
def pretrained() -> tuple[pathlib.Path, str]:
  """(workdir, printed text) of an uninterrupted pre-training run; its base.safetensors is where RL starts from."""
  return once('pretrained', 'pretrain.py', PRETRAIN)


@functools.cache
def rl_changes() -> dict:
  return RL | {'init_from': str(pretrained()[0] / 'base.safetensors')}


@functools.cache
def trained() -> tuple[pathlib.Path, str]:
  """(workdir, printed text) of an uninterrupted RL run."""
  return once('trained', 'r1_zero.py', rl_changes())


def lines(path: pathlib.Path) -> list[dict]:
  """The whole lines of a .jsonl file; the last may be cut while it is being written."""
  out = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      out.append(json.loads(line))
    except ValueError:
      break
  return out


def metrics(workdir: pathlib.Path) -> list[dict]:
  """metrics.jsonl without its clocks, which differ between equal runs."""
  return [{k: v for k, v in line.items() if k != 'time'} for line in lines(workdir / 'metrics.jsonl')]


def summary(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / 'summary.json').read_text())


def checkpoints(workdir: pathlib.Path) -> list[int]:
  """Steps of the whole checkpoints."""
  folder = workdir / 'checkpoints'
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def restored(workdir: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
  """(state by flat name, host record) of the newest checkpoint, read by Orbax alone."""
  with ocp.CheckpointManager(workdir / 'checkpoints', item_names=('state', 'host'), item_handlers={
      'state': ocp.PyTreeCheckpointHandler(), 'host': ocp.JsonCheckpointHandler()}) as manager:
    step = manager.latest_step()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), manager.item_metadata(step).state.tree)
    got = manager.restore(step, args=ocp.args.Composite(  # on whatever devices it was saved
      state=ocp.args.PyTreeRestore(restore_args=as_numpy), host=ocp.args.JsonRestore()))
  flat = jax.tree_util.tree_leaves_with_path(got['state'])
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}, got['host']


def events(workdir: pathlib.Path) -> EventAccumulator:
  """What TensorBoard reads in a workdir, every point of it."""
  accumulator = EventAccumulator(str(workdir), size_guidance={'scalars': 0, 'histograms': 0, 'tensors': 0})
  return accumulator.Reload()


def steps_of(found) -> list[int]:
  return [event.step for event in found]


def wait_until(condition, process: subprocess.Popen):
  """Polls every 5 ms; fails if the process ends first."""
  deadline = time.monotonic() + LIMIT_S
  while not condition():
    assert process.poll() is None, f'the run ended too early:\n{"".join(process.communicate())}'
    assert time.monotonic() < deadline, f'not within {LIMIT_S} s'
    time.sleep(0.005)
