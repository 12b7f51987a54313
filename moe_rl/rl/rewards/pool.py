"""Grades responses in worker processes that are killed from outside when an item takes too long.

The parent is one thread and never blocks on a pipe: a selector watches all pipes, writes go out as far as
they fit, and each wait ends at the earliest deadline. Signals and threads are no timeout for untrusted text:
a big power holds the interpreter in C, and only a kill ends it. Workers are plain subprocesses: nothing forks
a process that holds jax, and nothing imports `__main__` again.
"""

import collections
import dataclasses
import selectors
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from moe_rl.rl.rewards import functions, verdicts
from moe_rl.rl.rewards.process import START_S, Worker

WORKERS, TIMEOUT_S, MEMORY_MB = 2, 5.0, 2048  # processes; seconds an item; MiB a worker

# A start may be lost to a passing cause (killed for memory); three in a row are a fault of the machine.
_MAX_FAILED_STARTS = 3
# A chunk hides the round trip of its items (100 us), and is small, since all behind a hanging item wait.
_MAX_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Item:
  """One response to grade.

  kind: a key of `functions.ACCURACY`.
  response: text the model wrote after the prompt; any string, also with NUL bytes or lone surrogates.
  reference: what the kind expects, see `functions.check_reference`.
  terms: further terms of the reward that read the text, such as `language:en`, see `terms`.
  """
  kind: str
  response: str
  reference: str
  terms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Grade:
  """What one response earned.

  verdict: one of `verdicts.VERDICTS`.
  accuracy: 1.0 if the verdict is correct, otherwise 0.0.
  format: 1.0 or 0.0, see `functions.format_reward`; known also when the answer's check timed out or crashed.
  seconds: wall time of the check.
  scores: the item's further terms in its order; zeros if they could not be told in time.
  """
  verdict: str
  accuracy: float
  format: float
  seconds: float
  scores: tuple[float, ...] = ()


def count_verdicts(grades: Iterable[Grade]) -> dict[str, int]:
  """Number of grades by verdict, with a key for every verdict, and for 'open' where there are some; the values add up
  to the number of grades."""
  counts = dict.fromkeys(verdicts.VERDICTS, 0)
  for grade in grades:
    counts[grade.verdict] = counts.get(grade.verdict, 0) + 1
  return counts


class _Batch:
  """The items of one call, what is still to be handed out, and the grades so far."""

  def __init__(self, items: list[Item], tick: Callable[[], object] | None):
    self.items = items
    self.tick = tick or (lambda: None)
    self.pending = collections.deque(range(len(items)))
    self.grades: list[Grade | None] = [None] * len(items)
    self.scores: dict[int, tuple[float, ...]] = {}
    self.left = len(items)

  def settle(self, index: int, verdict: str, form: float, seconds: float) -> None:
    scores = self.scores.get(index, (0.0,) * len(self.items[index].terms))
    self.grades[index] = Grade(verdict, float(verdict == verdicts.CORRECT), form, seconds, scores)
    self.left -= 1
    self.tick()

  def lose(self, index: int, verdict: str, seconds: float) -> None:
    """Settles an item whose worker is gone; the format needs no worker."""
    self.settle(index, verdict, functions.format_reward(self.items[index].response), seconds)


class RewardPool:
  """Worker processes that grade; started at the first `grade`, kept until `close`. A context manager.

  workers: most processes at a time. timeout_s: wall seconds an item may take; start-up and imports are not
  counted. memory_mb: address space of a worker, MiB. Raises ValueError for sizes that cannot work.
  """

  def __init__(self, workers: int = WORKERS, timeout_s: float = TIMEOUT_S, memory_mb: int = MEMORY_MB):
    if workers < 1:
      raise ValueError(f'a reward pool needs at least 1 worker, got workers={workers}')
    if not 0 < timeout_s < float('inf'):
      raise ValueError(f'timeout_s={timeout_s} is no limit: set seconds an answer, such as 5.0')
    if memory_mb < 128:
      raise ValueError(f'memory_mb={memory_mb} is too small for math-verify (70 at rest): set 512 or more')
    self._workers, self._timeout_s, self._memory_mb = workers, timeout_s, memory_mb
    self._team: list[Worker] = []
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

  def grade(self, items: Iterable[Item], tick: Callable[[], object] | None = None) -> list[Grade]:
    """Grades in the order given. An item that hangs or kills its worker costs only itself.

    tick: called once an item, as its grade is known, such as a progress bar's `update`.
    Raises ValueError for an unknown kind (before any work) and RuntimeError if workers cannot start.
    """
    batch = _Batch(list(items), tick)
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

  def check(self, pairs: Sequence[tuple[str, str]]) -> list[str | None]:
    """For each (kind, reference): None if it can be graded against, otherwise why not, as one line for people.

    What a rule cannot read in microseconds is read in a worker: it costs at most the time limit. Raises as `grade`.
    """
    for kind, _ in pairs:
      functions.check_kind(kind)
    slow = [pair for pair in dict.fromkeys(pairs) if not functions.ACCURACY[pair[0]].quick(pair[1])]
    # An empty answer is graded no further than its reference.
    grades = self.grade([Item(kind, '<answer></answer>', reference) for kind, reference in slow])
    why: dict[tuple[str, str], str | None] = dict.fromkeys(slow)
    for (kind, reference), grade in zip(slow, grades, strict=True):
      if grade.verdict == verdicts.TIMEOUT:
        why[kind, reference] = f'reference {reference[:80]!r} takes over {self._timeout_s:g} s to read'
      elif grade.verdict != verdicts.UNPARSABLE_ANSWER:
        why[kind, reference] = functions.complaint(kind, reference)
    return [why[pair] if pair in why else functions.check_reference(*pair) for pair in pairs]

  def _stop(self) -> None:
    for worker in self._team:
      worker.kill()
    self._team.clear()

  def _run(self, batch: _Batch) -> None:
    for worker in [worker for worker in self._team if worker.process.poll() is not None]:
      self._dismiss(worker)  # died while idle: costs nothing
    while batch.left:
      while batch.pending and len(self._team) < min(self._workers, batch.left):
        self._team.append(Worker(self._timeout_s, self._memory_mb))
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

  def _hear(self, worker: Worker, batch: _Batch) -> None:
    """Takes in what a worker has said; then, and only then, judges whether it is dead or late."""
    messages, ended = worker.receive()
    for message in messages:
      self._take(worker, message, batch)
    if worker not in self._team:
      return
    if ended:
      self._lose_item(worker, batch, verdicts.CRASH)
      self._count_failed_start(worker)
      self._dismiss(worker, batch)
    elif worker.deadline is not None and time.monotonic() >= worker.deadline:
      self._late(worker, batch)

  def _late(self, worker: Worker, batch: _Batch) -> None:
    """The item in work pays, the others go back in line; a worker that is stuck in itself is replaced."""
    if worker.ready:
      self._lose_item(worker, batch, verdicts.TIMEOUT)
      self._take_back(worker, batch)
      worker.kill_child()
    elif worker.killed:
      self._dismiss(worker, batch)
    else:
      self._refuse(worker, f'not ready after {START_S:.0f} s')

  def _take(self, worker: Worker, message: list, batch: _Batch) -> None:
    """One message, see the protocol in `worker`."""
    tag, *fields = message
    if worker.killed and tag != 'ready':
      return  # last words of a child that was killed
    worker.since = time.monotonic()
    if tag == 'ready':
      worker.begin(fields[0])
      self._failed_starts = 0
    elif tag == 'failed':
      self._refuse(worker, fields[0])
    elif tag == 'scores':
      batch.scores[fields[0]] = tuple(fields[1])
    elif tag == 'result':
      index, verdict, form, seconds = fields
      worker.owed.remove(index)
      batch.settle(index, verdict, form, seconds)
    else:  # this child works no more: 'loading', 'leaving' or 'died'
      if tag == 'died':
        self._lose_item(worker, batch, verdicts.CRASH)
      self._take_back(worker, batch)
      worker.pause()

  def _lose_item(self, worker: Worker, batch: _Batch, verdict: str) -> None:
    """The item in work, if there is one, pays with the verdict."""
    if worker.owed:
      batch.lose(worker.owed.popleft(), verdict, time.monotonic() - worker.since)

  def _take_back(self, worker: Worker, batch: _Batch) -> None:
    """What a worker still owes goes back to the front of the line, in order."""
    batch.pending.extendleft(reversed(worker.owed))
    worker.owed.clear()

  def _count_failed_start(self, worker: Worker) -> None:
    if not worker.started:
      self._failed_starts += 1
      if self._failed_starts >= _MAX_FAILED_STARTS:
        self._refuse(worker, f'{self._failed_starts} in a row died before they were ready')

  def _dismiss(self, worker: Worker, batch: _Batch | None = None) -> None:
    """Ends a worker; what it still owes goes back in line."""
    worker.kill()
    self._team.remove(worker)
    if batch is not None:
      self._take_back(worker, batch)

  def _refuse(self, worker: Worker, why: str) -> None:
    said = worker.stderr_tail() or 'nothing'
    raise RuntimeError(
        f'reward workers cannot start: {why}.\nLast words on stderr: {said}\n'
        f'Remedy: try `{sys.executable} -c "import moe_rl, math_verify"`; if a module is missing, install '
        f'moe_rl with its requirements there; if memory is short, raise memory_mb (now {self._memory_mb}) or '
        f'lower workers (now {self._workers}).')
