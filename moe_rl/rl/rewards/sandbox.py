r"""Runs a Python program that nobody has read, in a process that can reach nothing.

Meant for a reward worker on Linux, single-threaded, where it forks: keeper -> init -> program. What holds the program:

  namespaces   Own mounts, processes, network, IPC and host name. Its root is an empty file system in memory of 32 MiB
               with the interpreter and the system's libraries bound read-only: no file of the machine can be read,
               changed or deleted, and what is written is gone with the run. No network, not even loopback. It sees no
               process but its own, and when it ends, all that it started end with it. As root the namespaces are made
               directly and the program runs as a user id of its own that owns nothing; otherwise within a user
               namespace.
  limits       CPU seconds, address space, file size, processes and threads, open files, no core; wall seconds and
               output are watched from outside. First to go when memory is short. No capability, and no way to gain one
               (no_new_privs).
  environment  Seven variables, none of the parent's. Standard input and output are pipes, all else is closed.

Where namespaces are refused (some containers), a seccomp filter takes their place: no socket, no signal, no new
process, no file opened for writing, created, renamed or deleted; as root the program also runs as a user id of its own,
if such a user can reach the interpreter. NOT held there: it can read what the user may read (what everyone may read,
with an id of its own), which includes the environment of the user's other processes; and even `/tmp` cannot be written.
`level()` tells which of the two is in force. Elsewhere than on Linux x86-64 and arm64 `run` refuses.

That a program does not lie about its own tests is `harness`'s part: they run in a process of their own.
"""

import dataclasses
import fcntl
import functools
import os
import resource
import select
import signal
import sys
import time

from moe_rl.rl.rewards import kernel

_OUTPUT_BYTES = 2**20
_FILE_BYTES = 16 * 2**20
_PROCESSES = 16  # and threads
_SYSTEM = ('/usr', '/lib', '/lib32', '/lib64', '/bin')
_DEVICES = ('null', 'zero', 'random', 'urandom')
_ROOT = '/sys'  # in the program's own mounts an empty file system is laid over it; nothing of it is needed
_ENVIRONMENT = {
    'PATH': '/usr/local/bin:/usr/bin:/bin', 'HOME': '/tmp', 'TMPDIR': '/tmp', 'LANG': 'C.UTF-8', 'PYTHONHASHSEED': '0',
    'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
_FIRST_USER = 2_000_000  # far from the ids that people and containers are given
_NO_SETUP = 97  # exit status: it could not be contained, so it was not run


@dataclasses.dataclass(frozen=True)
class Limits:
  """wall_s: seconds for a run, start of the interpreter included; memory_mb: address space of each process, MiB."""

  wall_s: float = 4.0
  memory_mb: int = 512


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  status: exit status of the program, or -N if signal N ended it; None if it ran into its wall limit.
  output, errors: what it wrote to standard output and error, up to 1 MiB each.
  report: what it wrote to file descriptor 3, up to 1 MiB.
  """

  status: int | None
  output: bytes
  errors: bytes
  report: bytes

  @property
  def late(self) -> bool:
    """Whether it used up its wall or CPU seconds."""
    return self.status in (None, -signal.SIGXCPU)


def run(source: str, stdin: bytes, limits: Limits) -> Outcome:
  """Runs `source` with the interpreter of this process, isolated (-I), as `-c` would.

  Raises RuntimeError if it cannot be contained on this machine: then it was not run.
  """
  if level() == 'none':
    raise RuntimeError('programs cannot be contained on this machine: code needs Linux on x86-64 or arm64, with user '
                       'namespaces, root, or seccomp')
  return _run(source, stdin, limits, level())


@functools.cache
def level() -> str:
  """'namespaces', 'filter' (seccomp alone) or 'none': what can be had on this machine, tried once."""
  if sys.platform == 'linux' and kernel.MACHINE:
    for kind in ('namespaces', 'filter'):
      if _run('print(1)', b'', Limits(wall_s=20.0), kind).output == b'1\n':
        return kind
  return 'none'


def _run(source: str, stdin: bytes, limits: Limits, kind: str) -> Outcome:
  pipes = [os.pipe() for _ in range(4)]  # stdin, stdout, stderr, report
  theirs = [pipes[0][0], *(write for _, write in pipes[1:])]
  ours = [pipes[0][1], *(read for read, _ in pipes[1:])]
  parent = os.getpid()
  child = os.fork()
  if child == 0:
    start = _start_in_namespaces if kind == 'namespaces' else _start_filtered
    try:
      for fd in ours:
        os.close(fd)
      start(source, theirs, limits, parent)
    except OSError:
      pass  # the namespace or the filter cannot be had: `level` finds out
    finally:
      os._exit(_NO_SETUP)
  for fd in theirs:
    os.close(fd)
  exchange = _Exchange(ours, stdin)
  deadline, ended = time.monotonic() + limits.wall_s, False
  try:
    while not ended and (left := deadline - time.monotonic()) > 0:
      exchange.step(min(left, 0.01))
      ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    exchange.step(0.0, to_the_end=ended)
  finally:
    os.kill(child, signal.SIGKILL)  # not reaped yet, so the id is still its own; all it started dies with it
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    exchange.close()
  status = 128 - status if 128 < status < 193 else status  # the keeper's word for a signal
  return Outcome(status if ended else None, *exchange.texts)


class _Exchange:
  """Feeds a program's input and takes its outputs, never blocking."""

  def __init__(self, fds: list[int], stdin: bytes):
    self._inbox, *self._outputs = fds
    self._stdin = memoryview(stdin)
    self._texts = {fd: bytearray() for fd in self._outputs}
    self._open = set(self._outputs)
    for fd in fds:
      os.set_blocking(fd, False)

  @property
  def texts(self) -> list[bytes]:
    return [bytes(self._texts[fd]) for fd in self._outputs]

  def step(self, seconds: float, to_the_end: bool = False) -> None:
    """Waits up to so many seconds for something to do; at the end, takes what is still in the pipes."""
    self._feed()
    writing = [self._inbox] if self._inbox is not None else []
    readable, _, _ = select.select(list(self._open), writing, [], seconds)
    for fd in list(self._open) if to_the_end else readable:
      self._take(fd, to_the_end)

  def _feed(self) -> None:
    try:
      while self._inbox is not None and self._stdin:
        self._stdin = self._stdin[os.write(self._inbox, self._stdin[:1 << 16]):]
    except BlockingIOError:
      return
    except BrokenPipeError:
      pass
    if self._inbox is not None:
      os.close(self._inbox)
      self._inbox = None

  def _take(self, fd: int, all_of_it: bool) -> None:
    try:
      while data := os.read(fd, 1 << 16):
        self._texts[fd] += data[:max(_OUTPUT_BYTES - len(self._texts[fd]), 0)]
        if not all_of_it or len(self._texts[fd]) >= _OUTPUT_BYTES:
          return
      self._open.discard(fd)
    except BlockingIOError:
      pass

  def close(self) -> None:
    for fd in (*self._outputs, *([self._inbox] if self._inbox is not None else [])):
      os.close(fd)


# From here on: in the child, which never returns.


def _start_filtered(source: str, fds: list[int], limits: Limits, parent: int) -> None:
  program = kernel.filter_program()
  os.chdir('/')
  kernel.drop_capabilities()
  if all(_others_may_enter(path) for path in (sys.executable, os.path.realpath(sys.executable))):
    _become_nobody()
  kernel.die_with_parent(parent)
  kernel.gain_no_privileges()
  _set_limits(limits)
  _take_fds(fds)
  kernel.apply_filter(program)
  _execute(source)


def _start_in_namespaces(source: str, fds: list[int], limits: Limits, parent: int) -> None:
  """The keeper: makes the namespaces, and waits for their init to end."""
  flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
  user, group = os.geteuid(), os.getegid()
  if user == 0:
    kernel.unshare(flags)
  else:
    kernel.unshare(flags | kernel.CLONE_NEWUSER)
    for name, text in (('setgroups', 'deny'), ('uid_map', f'{user} {user} 1'), ('gid_map', f'{group} {group} 1')):
      with open(f'/proc/self/{name}', 'w') as file:
        file.write(text)
  kernel.die_with_parent(parent)
  init = os.fork()
  if init == 0:
    kernel.die_with_parent(0)
    _init(source, fds, limits)
  for fd in fds:
    os.close(fd)
  os._exit(_as_exit(os.waitpid(init, 0)[1]))


def _init(source: str, fds: list[int], limits: Limits) -> None:
  """Process 1 of the namespace: makes its file system, starts the program, and takes all with it when it ends."""
  _make_root()
  program = os.fork()
  if program == 0:
    try:
      os.setsid()
      kernel.drop_capabilities()
      _become_nobody()
      kernel.gain_no_privileges()
      _set_limits(limits)
      _take_fds(fds)
      _execute(source)
    finally:
      os._exit(_NO_SETUP)
  for fd in fds:
    os.close(fd)
  while True:  # orphans are this process's children too
    pid, status = os.wait()
    if pid == program:
      os._exit(_as_exit(status))


def _as_exit(status: int) -> int:
  code = os.waitstatus_to_exitcode(status)
  return code if code >= 0 else 128 - code


def _make_root() -> None:
  """An empty root in memory with the interpreter, the system's libraries, four devices, /proc and /tmp."""
  kernel.mount('none', '/', None, kernel.MS_REC | kernel.MS_PRIVATE)
  kernel.mount('tmpfs', _ROOT, 'tmpfs', kernel.MS_NOSUID | kernel.MS_NODEV, 'size=32m,nr_inodes=8192,mode=755')
  for path in dict.fromkeys((*_SYSTEM, os.path.realpath(sys.base_prefix), sys.prefix)):
    target = _ROOT + path
    if os.path.islink(path) and path in _SYSTEM:
      os.symlink(os.readlink(path), target)
    elif os.path.isdir(path) and not os.path.isdir(target):
      os.makedirs(target)
      kernel.bind_read_only(path, target)
  os.makedirs(f'{_ROOT}/dev')
  for name in _DEVICES:
    with open(f'{_ROOT}/dev/{name}', 'w'):
      pass
    kernel.mount(f'/dev/{name}', f'{_ROOT}/dev/{name}', None, kernel.MS_BIND)
  os.mkdir(f'{_ROOT}/proc')
  try:
    kernel.mount('proc', f'{_ROOT}/proc', 'proc', kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
  except OSError:
    pass  # refused within some containers; programs hardly need it
  os.makedirs(f'{_ROOT}/tmp', exist_ok=True)  # an interpreter may lie in it
  os.chmod(f'{_ROOT}/tmp', 0o1777)
  os.chroot(_ROOT)
  os.chdir('/tmp')


def _become_nobody() -> None:
  """As root: a user that owns nothing, another in each run, so that limits by user count this run alone."""
  if os.geteuid() == 0:
    user = _FIRST_USER + time.monotonic_ns() % 1_000_000
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _others_may_enter(path: str) -> bool:
  """Whether a user that owns nothing can run this program: not so where it is installed in root's home."""
  while path != '/':
    path = os.path.dirname(path)
    if not os.stat(path).st_mode & 1:
      return False
  return True


def _set_limits(limits: Limits) -> None:
  for name, amount in (
      ('RLIMIT_CPU', int(limits.wall_s) + 1), ('RLIMIT_AS', limits.memory_mb * 2**20), ('RLIMIT_FSIZE', _FILE_BYTES),
      ('RLIMIT_NPROC', _PROCESSES), ('RLIMIT_NOFILE', 64), ('RLIMIT_CORE', 0), ('RLIMIT_STACK', 8 * 2**20)):
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    # CPU: the soft limit says so by a signal of its own; the hard one a second later cannot be ignored.
    resource.setrlimit(kind, (amount, amount + 1 if name == 'RLIMIT_CPU' and hard > amount else amount))
  try:
    with open('/proc/self/oom_score_adj', 'w') as file:
      file.write('1000')
  except OSError:
    pass


def _take_fds(fds: list[int]) -> None:
  """The pipes become 0 to 3, all else is closed."""
  moved = [fd if fd > 3 else fcntl.fcntl(fd, fcntl.F_DUPFD, 4) for fd in fds]
  for number, fd in enumerate(moved):
    os.dup2(fd, number)
  os.closerange(4, 1024)


def _execute(source: str) -> None:
  for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
  os.execve(sys.executable, [sys.executable, '-I', '-B', '-c', source], _ENVIRONMENT)
