"""The pool's side of a worker: the process, its pipes, and the items it owes. See `worker` for the other side."""

import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from moe_rl.rl.rewards import functions

# Import of sympy and math-verify takes 2 s; thirty times that on a loaded machine with a cold disk.
START_S = 60.0
# A template forks in milliseconds; one that does not for so long is replaced.
_FORK_S = 10.0
# All results of a chunk take less than 1 kB; a worker that says more than this has lost its mind.
_MAX_UNREAD_BYTES = 2**20
# From the trainer's environment a worker gets these alone: no tokens, no proxies, no accelerator settings.
_INHERITED = ('PATH', 'LD_LIBRARY_PATH', 'DYLD_LIBRARY_PATH', 'LANG', 'LC_ALL', 'SYSTEMROOT')


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


class Worker:
  """One process (the template), the child it forked to grade, their pipes, and the items that the child owes.

  owed: indices in the order sent; the first is in work.
  since: when the present wait (for its start, its imports or the item in work) began, monotonic seconds.
  killed: its child was killed, and what that one still said counts no more.
  """

  def __init__(self, timeout_s: float, memory_mb: int):
    self.ready = self.killed = self.started = False
    self.child, self.child_fd = 0, None
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
      return self.since + (_FORK_S if self.killed else START_S)
    return self.since + self.timeout_s if self.owed else None

  def begin(self, child: int) -> None:
    """A child was forked and may be sent items."""
    self._forget_child()
    self.ready, self.killed, self.started, self.child = True, False, True, child
    try:
      self.child_fd = os.pidfd_open(child)  # a process id alone might be another process's by the time of the kill
    except (AttributeError, OSError):  # macOS, old kernels; or it is dead already
      self.child_fd = None

  def pause(self) -> None:
    """No child until the next `begin`."""
    self.ready, self.outbox, self.since = False, b'', time.monotonic()
    self.owed.clear()

  def kill_child(self) -> None:
    """Ends the child; the template forks another, and that one's `begin` will be heard of."""
    self.pause()
    self.killed = True
    try:
      if self.child_fd is not None:
        signal.pidfd_send_signal(self.child_fd, signal.SIGKILL)
      else:
        os.kill(self.child, signal.SIGKILL)
    except ProcessLookupError:
      pass

  def _forget_child(self) -> None:
    if self.child_fd is not None:
      os.close(self.child_fd)
      self.child_fd = None

  def send(self, indices: Sequence[int], items: Sequence) -> None:
    """Hands over a chunk; only to a ready worker that owes nothing."""
    chunk = [(i, items[i].kind, items[i].response, items[i].reference, items[i].terms) for i in indices]
    self.owed.extend(indices)
    # The line break first ends what an earlier child may have left half read.
    self.outbox = b'\n' + json.dumps([self.child, chunk]).encode('ascii') + b'\n'
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
    self._forget_child()
    for pipe in (self.process.stdin, self.process.stdout, self.stderr):
      pipe.close()
