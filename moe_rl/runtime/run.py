"""A run's folder: config, Orbax checkpoints, metrics.jsonl, TensorBoard, summary.json, and the way back into it."""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_rl.runtime import hosts

# Keys that may differ between the run that made a folder and the one that goes on in it.
FREE_KEYS = ('checkpoint.', 'device_hour', 'rewards.workers', 'rewards.timeout_s', 'rewards.memory_mb', 'mesh.',
             'eval.every', 'sampling.batch_samples')


class Workdir:
  """A folder that belongs to one config. Only process 0 writes.

  Layout: config.json, TensorBoard event files, summary.json at the end.
  """

  def __init__(self, config, workdir: str | os.PathLike):
    if '://' in str(workdir):
      raise ValueError(f'--workdir {workdir}: a folder is needed; mount the bucket (gcsfuse) and give its path')
    self.path = pathlib.Path(workdir).absolute()
    self.main = jax.process_index() == 0
    self._claim(config)
    self._writer, self._handlers = None, {}
    self._stop = False

  def _claim(self, config):
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      probe = self.path / '.writable'
      probe.write_text('')
      probe.unlink(missing_ok=True)
    except OSError as e:
      raise ValueError(f'--workdir {self.path}: cannot be written ({e.strerror}): choose another folder') from e
    self._config, kept = json.loads(config.to_json_best_effort()), self.path / 'config.json'
    if kept.exists():
      different = compare(json.loads(kept.read_text()), self._config)
      if different:
        raise ValueError(f'--workdir {self.path} belongs to another config: {"; ".join(different[:5])}. '
                         'Use another workdir, or the same values to go on with that run')
    elif any((self.path / 'checkpoints').glob('[0-9]*')):
      raise ValueError(f'--workdir {self.path} has checkpoints but no config.json to compare with: use another')

  def finished(self) -> dict | None:
    """The summary of a run that is complete: to be given again, with nothing left to do."""
    path = self.path / 'summary.json'
    summary = json.loads(path.read_text()) if path.exists() else {}
    return summary if summary.get('complete') else None

  def open(self, purge_step: int | None = None):
    """Makes the folder this config's own. Not earlier: a start that is refused leaves no mark on it."""
    if not self.main:
      return
    if not (self.path / 'config.json').exists():
      replace(self.path / 'config.json', json.dumps(self._config, indent=1))
    self._writer = _tensorboard().SummaryWriter(str(self.path), purge_step=purge_step, flush_secs=10)

  def scalars(self, step: int, numbers: dict[str, float]):
    """Numbers to TensorBoard."""
    if self.main:
      for k, v in numbers.items():
        self._writer.add_scalar(k, v, step)

  def evaluation(self, step: int, record: dict):
    """A held-out evaluation's numbers to TensorBoard."""
    self.scalars(step, {f'eval/{k}': v for k, v in record.items() if isinstance(v, float)})

  def histogram(self, step: int, name: str, values):
    if self.main:
      self._writer.add_histogram(name, np.asarray(values), step)

  def text(self, step: int, name: str, text: str):
    if self.main:
      self._writer.add_text(name, text, step)

  def summary(self, record: dict):
    """summary.json."""
    if self.main:
      replace(self.path / 'summary.json', json.dumps(record, indent=1) + '\n')

  def close(self):
    if self._writer:
      self._writer.close()
    for number, handler in self._handlers.items():  # a notebook's own Ctrl-C is back
      signal.signal(number, handler)

  @property
  def stop_requested(self) -> bool:
    """Whether any host was asked to stop. All hosts have to ask this equally often, as they do so together."""
    return any(hosts.gather(self._stop))

  @stop_requested.setter
  def stop_requested(self, asked: bool):
    self._stop = asked

  def agreed(self, value, what: str):
    """The value. Raises ValueError unless all hosts see the same in the folder; what: the value is."""
    seen = hosts.gather(value)
    if any(other != value for other in seen):
      raise ValueError(f'--workdir {self.path}: {what} {seen} as the hosts see it: use a folder that all hosts share')
    return value

  def catch_signals(self):
    """SIGTERM (a preempted TPU) and SIGINT ask the loop to save and stop; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
      return

    def handler(number, _):
      self._stop = True
      signal.signal(number, signal.SIG_DFL)
    self._handlers = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}


class Run(Workdir):
  """A workdir with a state that goes on: checkpoints/, metrics.jsonl (a line a step), evaluations.jsonl besides."""

  def __init__(self, config, workdir: str | os.PathLike):
    super().__init__(config, workdir)
    options = ocp.CheckpointManagerOptions(max_to_keep=config.checkpoint.keep, enable_async_checkpointing=True)
    if jax.default_backend() == 'cpu':  # devices with the same array would share its writing, cut by compiled programs
      ocp.type_handlers.register_type_handler(
        jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True)
    self._manager = ocp.CheckpointManager(self.path / 'checkpoints', options=options)
    self._metrics = None

  @property
  def begun(self) -> bool:
    """Whether there is a checkpoint to go on from."""
    return self._manager.latest_step() is not None

  def finished(self) -> dict | None:
    """The summary of a run that is complete: to be given again, with nothing left to do."""
    return super().finished() if self.begun else None

  def restore(self, abstract_state) -> tuple[int, object, dict] | None:
    """(step, state, host record) of the newest checkpoint, or None. Later lines of metrics.jsonl are taken back."""
    step = self.agreed(self._manager.latest_step(), 'the newest checkpoint is of step')
    if step is None:
      self._open(0)
      return None
    got = self._manager.restore(step, args=ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract_state), host=ocp.args.JsonRestore()))
    self._open(step)
    return step, got['state'], got['host']

  def _open(self, step: int):
    self.open(purge_step=step + 1 if step else None)
    if not self.main:
      return
    for path in (self.path / 'metrics.jsonl', self.path / 'evaluations.jsonl'):
      lines = path.read_text().splitlines() if path.exists() else []
      kept = [line for line in lines if _step_of(line) <= step] if step else []
      replace(path, ''.join(line + '\n' for line in kept))
    self._metrics = (self.path / 'metrics.jsonl').open('a', buffering=1)

  def save(self, step: int, state, host: dict):
    """Starts writing a checkpoint; returns once the device arrays are copied. Waits for the one before."""
    if self._writer:
      self._writer.flush()  # so that no checkpoint is ahead of its curves
    self._manager.save(step, args=ocp.args.Composite(
      state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)))

  def log(self, step: int, numbers: dict, seconds: dict):
    """Numbers to metrics.jsonl and TensorBoard; `seconds` (clocks, rates) apart, as they differ between equal runs."""
    if not self.main:
      return
    numbers = {k: _number(v) for k, v in numbers.items()}
    seconds = {k: _number(v) for k, v in seconds.items()}
    self._metrics.write(json.dumps({'step': step, **numbers, 'time': seconds}) + '\n')
    self.scalars(step, {k if '/' in k else f'train/{k}': v for k, v in (*numbers.items(), *seconds.items())})

  def log_evaluation(self, step: int, record: dict):
    """A held-out evaluation's numbers to evaluations.jsonl and TensorBoard."""
    if self.main:
      with (self.path / 'evaluations.jsonl').open('a') as f:
        f.write(json.dumps({'step': step, **record}) + '\n')
      self.evaluation(step, record)

  def summary(self, record: dict):
    """summary.json, once the last checkpoint is whole."""
    self._manager.wait_until_finished()
    super().summary(record)

  def close(self):
    self._manager.wait_until_finished()
    self._manager.close()
    if self._metrics:
      self._metrics.close()
    super().close()


def _tensorboard():
  """tensorboardX. Where torch is installed it imports that too, for seconds, and we have no tensors of torch's."""
  hide = 'torch' not in sys.modules
  if hide:
    sys.modules['torch'] = None  # to import it raises ImportError, which tensorboardX expects
  try:
    import tensorboardX
  finally:
    if hide:
      del sys.modules['torch']
  return tensorboardX


class CompileCounter:
  """Counts XLA compilations from its making on; the loop logs it, since a growing count is a shape that changes."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration: float, **_):
    if event.endswith('backend_compile_duration'):
      self.count += 1


class Clock:
  """Wall seconds by part of a step: `with clock('rollout'): …`; `clock.take()` gives them and starts anew."""

  def __init__(self):
    self._spent, self._name, self._start = {}, None, None

  def __call__(self, name: str):
    self._name = name
    return self

  def __enter__(self):
    self._start = time.perf_counter()

  def __exit__(self, *_):
    self._spent[self._name] = self._spent.get(self._name, 0.0) + time.perf_counter() - self._start

  def take(self) -> dict[str, float]:
    spent, self._spent = self._spent, {}
    return {f'seconds/{k}': v for k, v in spent.items()}


def compare(old: dict, new: dict, prefix: str = '') -> list[str]:
  """What differs between two configs, a phrase each, but for the keys that may."""
  out = []
  for key in sorted(old.keys() | new.keys()):
    name = prefix + key
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      out += compare(a, b, name + '.')
    elif a != b and not name.startswith(FREE_KEYS):
      out.append(f'config.{name} was {a!r}, is {b!r}')
  return out


def replace(path: pathlib.Path, text: str):
  """Writes by a temporary file and a rename, so that a kill leaves the old text or the new."""
  temporary = path.with_name(path.name + '.partial')
  temporary.write_text(text, encoding='utf-8')
  temporary.replace(path)


def _number(value) -> float | int:
  value = np.asarray(value).item()
  return value if isinstance(value, int) else float(value)


def _step_of(line: str) -> int:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError):  # the last line of a killed run may be cut
    return np.iinfo(np.int64).max
