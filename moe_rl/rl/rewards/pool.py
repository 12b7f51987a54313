"""Grades responses in worker processes that are killed from outside when an item takes too long.

The parent is one thread and never blocks on a pipe: a selector watches all pipes, writes go out as far as
they fit, and each wait ends at the earliest deadline. Signals and threads are no timeout for untrusted text:
a big power holds the interpreter in C, and only a kill ends it. Workers are plain subprocesses: nothing forks
a process that holds jax, and nothing imports `__main__` again.
"""

import collections
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence

from moe_rl.rl.rewards import functions

# Import of sympy and math-verify takes 2 s; ten times that on a loaded machine with a cold disk.
_START_S = 60.0
# A start may be lost to a passing cause (killed for memory); three in a row are a fault of the machine.
_MAX_FAILED_STARTS = 3
# A chunk hides the round trip of its items (100 us), and is small, since all behind a hanging item wait.
_MAX_CHUNK = 8
# All results of a chunk take less than 1 kB; a worker that says more than this has lost its mind.
_MAX_UNREAD_BYTES = 2**20
# From the trainer's environment a worker gets these alone: no tokens, no proxies, no accelerator settings.
_INHERITED = ('PATH', 'LD_LIBRARY_PATH', 'DYLD_LIBRARY_PATH', 'LANG', 'LC_ALL', 'SYSTEMROOT')


@dataclasses.dataclass(frozen=True)
class Item:
  """One response to grade.

  kind: a key of `functions.ACCURACY`.
  response: text the model wrote after the prompt; any string, also with NUL bytes or lone surrogates.
  reference: what the kind expects, see `functions.check_reference`.
  """
  kind: str
  response: str
  reference: str


@dataclasses.dataclass(frozen=True)
class Grade:
  """What one response earned.

  verdict: one of `functions.VERDICTS`.
  accuracy: 1.0 if the verdict is correct, otherwise 0.0.
  format: 1.0 or 0.0, see `functions.format_reward`; known also when the answer's check timed out or crashed.
  seconds: wall time of the check.
  """
  verdict: str
  accuracy: float
  format: float
  seconds: float


def count_verdicts(grades: Iterable[Grade]) -> dict[str, int]:
  """Number of grades by verdict, with a key for every verdict; the values add up to the number of grades."""
  counts = dict.fromkeys(functions.VERDICTS, 0)
  for grade in grades:
    counts[grade.verdict] += 1
  return counts


def worker_environment() -> dict[str, str]:
  """Environment of a worker: where programs and modules are, and nothing else of the parent's."""
  root = os.path.abspath(os.path.join(os.path.dirname(functions.__file__), *['..'] * 3))
  paths = [root, *(path for path in sys.path if os.path.isabs(path))]  # it can import what the trainer can
  return {
      **{name: os.environ[name] for name in _INHERITED if name in os.environ},
      'PYTHONPATH': os.pathsep.join(dict.fromkeys(paths)),
      'PYTHONSAFEPATH': '1',  # never import from the working directory
      'PYTHONHASHSEED': '0',  # sympy's order of terms, hence its running time, is the same in every run
      'PYTHONUTF8': '1',
      'HOME': tempfile.gettempdir(),
      'OMP_NUM_THREADS': '1',
      'OPENBLAS_NUM_THREADS': '1',
  }


class _Worker:
  """One process, its pipes, and the items it owes.

  owed: indices in the order sent; the first is in work.
  since: when the present wait (for its start, its imports or the item in work) began, monotonic seconds.
  """

  def __init__(self, timeout_s: float, memory_mb: int):
    self.ready = False
    self.owed: collections.deque[int] = collections.deque()
    self.inbox = b''
    self.outbox = b''
    self.timeout_s = timeout_s
    self.stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed by kill()
    command = [sys.executable, '-m', 'moe_rl.rl.rewards.worker', repr(timeout_s), str(memory_mb)]
    try:
      self.process = subprocess.Popen(
          command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, cwd='/',
          env=worker_environment(), start_new_session=True)
    except OSError as error:
      self.stderr.close()
      raise RuntimeError(f'cannot start a reward worker ({command[0]}): {error}') from error
    self.since = time.monotonic()
    os.set_blocking(self.process.stdin.fileno(), False)
    os.set_blocking(self.process.stdout.fileno(), False)

  @property
  def deadline(self) -> float | None:
    """When it must have been heard of, monotonic seconds; None when it has nothing to do."""
    if not self.ready:
      return self.since + _START_S
    return self.since + self.timeout_s if self.owed else None

  def send(self, indices: Sequence[int], items: Sequence[Item]) -> None:
    """Hands over a chunk; only to a ready worker that owes nothing."""
    chunk = [(i, items[i].kind, items[i].response, items[i].reference) for i in indices]
    self.owed.extend(indices)
    self.outbox = json.dumps(chunk).encode('ascii') + b'\n'
    self.since = time.monotonic()
    self.flush()

  def flush(self) -> None:
    """Writes what the pipe takes. The item's clock starts when the worker can have read the chunk."""
    try:
      while self.outbox:
        self.outbox = self.outbox[os.write(self.process.stdin.fileno(), self.outbox[:1 << 16]):]
        self.since = time.monotonic()
    except BlockingIOError:
      pass
    except BrokenPipeError:
      self.outbox = b''  # it is dead: the end of its output says so, and is handled there

  def receive(self) -> tuple[list[list], bool]:
    """(new whole messages, whether its output has ended or makes no sense). Never blocks."""
    ended = False
    try:
      while data := os.read(self.process.stdout.fileno(), 1 << 16):
        self.inbox += data
        if len(self.inbox) > _MAX_UNREAD_BYTES:
          return [], True
      ended = True
    except BlockingIOError:
      pass
    *lines, self.inbox = self.inbox.split(b'\n')
    try:
      return [json.loads(line) for line in lines], ended
    except ValueError:
      return [], True

  def stderr_tail(self) -> str:
    """The last 2,000 bytes it wrote to stderr while starting."""
    size = self.stderr.seek(0, os.SEEK_END)
    self.stderr.seek(max(0, size - 2000))
    return self.stderr.read().decode('utf-8', 'replace').strip()

  def kill(self) -> None:
    """Ends the process and all it may have started, and reaps it. May be called again."""
    try:
      os.killpg(self.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone already; macOS refuses for a group of zombies
      pass
    self.process.wait()
    for pipe in (self.process.stdin, self.process.stdout, self.stderr):
      pipe.close()


class _Batch:
  """The items of one call, what is still to be handed out, and the grades so far."""

  def __init__(self, items: list[Item]):
    self.items = items
    self.pending = collections.deque(range(len(items)))
    self.grades: list[Grade | None] = [None] * len(items)
    self.left = len(items)

  def settle(self, index: int, verdict: str, form: float, seconds: float) -> None:
    self.grades[index] = Grade(verdict, float(verdict == functions.CORRECT), form, seconds)
    self.left -= 1

  def lose(self, index: int, verdict: str, seconds: float) -> None:
    """Settles an item whose worker is gone; the format needs no worker."""
    self.settle(index, verdict, functions.format_reward(self.items[index].response), seconds)


class RewardPool:
  """Worker processes that grade; started at the first `grade`, kept until `close`. A context manager.

  workers: most processes at a time. timeout_s: wall seconds an item may take; start-up and imports are not
  counted. memory_mb: address space of a worker, MiB. Raises ValueError for sizes that cannot work.
  """

  def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_mb: int = 2048):
    if workers < 1:
      raise ValueError(f'a reward pool needs at least 1 worker, got workers={workers}')
    if not 0 < timeout_s < float('inf'):
      raise ValueError(f'timeout_s={timeout_s} is no limit: set seconds an answer, such as 5.0')
    if memory_mb < 128:
      raise ValueError(f'memory_mb={memory_mb} is too small for math-verify (70 at rest): set 512 or more')
    self._workers, self._timeout_s, self._memory_mb = workers, timeout_s, memory_mb
    self._team: list[_Worker] = []
    self._failed_starts = 0
    self._closed = False
    self._lock = threading.Lock()  # two calls at once take turns

  def __enter__(self) -> 'RewardPool':
    return self

  def __exit__(self, *unused_exc_info) -> None:
    self.close()

  def close(self) -> None:
    """Ends all workers and waits for them; after it no child process is left. May be called again."""
    with self._lock:
      self._closed = True
      self._stop()

  def grade(self, items: Iterable[Item]) -> list[Grade]:
    """Grades in the order given. An item that hangs or kills its worker costs only itself.

    Raises ValueError for an unknown kind (before any work) and RuntimeError if workers cannot start.
    """
    batch = _Batch(list(items))
    for item in batch.items:
      functions.check_kind(item.kind)
    with self._lock:
      if self._closed:
        raise RuntimeError('this reward pool is closed: make a new RewardPool')
      try:
        self._run(batch)
      except BaseException:
        self._stop()  # verdicts still under way must not reach the next call
        raise
    return batch.grades

  def _stop(self) -> None:
    for worker in self._team:
      worker.kill()
    self._team.clear()

  def _run(self, batch: _Batch) -> None:
    for worker in [worker for worker in self._team if worker.process.poll() is not None]:
      self._dismiss(worker)  # died while idle: costs nothing
    while batch.left:
      while batch.pending and len(self._team) < min(self._workers, batch.left):
        self._team.append(_Worker(self._timeout_s, self._memory_mb))
      self._hand_out(batch)
      self._wait()
      for worker in list(self._team):
        self._hear(worker, batch)

  def _hand_out(self, batch: _Batch) -> None:
    """Gives each free worker a chunk; smaller ones towards the end, so that all finish together."""
    for worker in self._team:
      if worker.ready and not worker.owed and batch.pending:
        size = min(max(len(batch.pending) // (4 * self._workers), 1), _MAX_CHUNK)
        worker.send([batch.pending.popleft() for _ in range(size)], batch.items)

  def _wait(self) -> None:
    """Sleeps until a pipe can be read or written or a deadline has come; writes what can be written."""
    deadlines = [worker.deadline for worker in self._team if worker.deadline is not None]
    with selectors.DefaultSelector() as selector:
      for worker in self._team:
        selector.register(worker.process.stdout, selectors.EVENT_READ)
        if worker.outbox:
          selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker)
      for key, _ in selector.select(max(0.0, min(deadlines) - time.monotonic())):
        if key.data:
          key.data.flush()

  def _hear(self, worker: _Worker, batch: _Batch) -> None:
    """Takes in what a worker has said; then, and only then, judges whether it is dead or late."""
    messages, ended = worker.receive()
    for message in messages:
      self._take(worker, message, batch)
    if worker not in self._team:
      return
    if ended:
      self._lost(worker, batch, functions.CRASH)
    elif worker.deadline is not None and time.monotonic() >= worker.deadline:
      self._lost(worker, batch, functions.TIMEOUT)

  def _take(self, worker: _Worker, message: list, batch: _Batch) -> None:
    """One message, see the protocol in `worker`."""
    tag, *fields = message
    worker.since = time.monotonic()
    if tag == 'ready':
      worker.ready = True
      self._failed_starts = 0
    elif tag == 'loading':
      worker.ready = False
    elif tag == 'failed':
      self._refuse(worker, fields[0])
    else:
      index, verdict, form, seconds, leaving = fields
      worker.owed.remove(index)
      batch.settle(index, verdict, form, seconds)
      if leaving:
        self._dismiss(worker, batch)

  def _lost(self, worker: _Worker, batch: _Batch, verdict: str) -> None:
    """A worker died or is late: the item in work pays with the verdict, the others go back in line."""
    if not worker.ready:
      self._failed_starts += 1
      if verdict == functions.TIMEOUT:
        self._refuse(worker, f'not ready after {_START_S:.0f} s')
      if self._failed_starts >= _MAX_FAILED_STARTS:
        self._refuse(worker, f'{self._failed_starts} in a row died before they were ready')
    elif worker.owed:
      batch.lose(worker.owed.popleft(), verdict, time.monotonic() - worker.since)
    self._dismiss(worker, batch)

  def _dismiss(self, worker: _Worker, batch: _Batch | None = None) -> None:
    """Ends a worker; what it still owes goes back to the front of the line, in order."""
    worker.kill()
    self._team.remove(worker)
    if batch is not None:
      batch.pending.extendleft(reversed(worker.owed))

  def _refuse(self, worker: _Worker, why: str) -> None:
    said = worker.stderr_tail() or 'nothing'
    raise RuntimeError(
        f'reward workers cannot start: {why}.\nLast words on stderr: {said}\n'
        f'Remedy: try `{sys.executable} -c "import moe_rl, math_verify"`; if a module is missing, install '
        f'moe_rl with its requirements there; if memory is short, raise memory_mb (now {self._memory_mb}) or '
        f'lower workers (now {self._workers}).')
