"""A reward worker: reads items from stdin, grades them one by one, writes each verdict at once.

Started by `pool.RewardPool` as `python -m moe_rl.rl.rewards.worker TIMEOUT_S MEMORY_MB`, in a session of its own. This
process is a template: it imports what is needed and forks a child, which grades. A child may hang or die on any item;
the pool sees that from outside and kills it, and the next child is there in milliseconds, with all imports done. The
template itself reads no untrusted text.

Protocol, one JSON text a line, ASCII only (so NUL bytes and lone surrogates survive as escapes):
  in   [child, [[index, kind, response, reference, terms], ...]]   a chunk for one child, graded in order; a line that
                                                                   is for another child, or cut, is skipped
  out  ["ready", child]                           a child was forked: it may be sent items
       ["scores", index, [score, ...]]            those of the item's terms, before its result
       ["result", index, verdict, format, seconds]
       ["loading"] ["leaving"] ["died"]           this child works no more, take back the rest, another will be ready:
                                                  after an import; since its memory is worn; no item is in work, but
                                                  for "died", where the item in work killed it
       ["failed", why]                            cannot work on this machine at all
"""

import ctypes
import gc
import json
import math
import os
import resource
import signal
import sys
import time

from moe_rl.rl.rewards import code, functions, text_terms, verdicts

# The pool's wall limit strikes first. The CPU limit ends a worker whose parent was killed in mid-item.
_CPU_GRACE_S = 2
# How a child ends on purpose: its input ended; another is wanted; a library is wanted first.
_END, _LEAVE = 0, 81
_LOAD = {name: 82 + i for i, name in enumerate(functions.LIBRARIES)}
_PR_SET_PDEATHSIG = 1
# No verifier has business writing more. Of a child: py3langid unpacks its model in a temporary file at import.
_MAX_FILE_BYTES = 16 * 2**20
# A process that keeps this share of its memory is replaced, so that it crashes on no innocent item later.
_WORN_SHARE = 0.5


def _limit(name: str, amount: int) -> None:
  """Lowers a soft limit, never above the hard one; silent where the system lacks or refuses it (macOS)."""
  kind = getattr(resource, name, None)
  if kind is None:
    return
  hard = resource.getrlimit(kind)[1]
  soft = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
  try:
    resource.setrlimit(kind, (soft, hard))
  except (ValueError, OSError):
    pass


def _limit_process(memory_mb: int) -> None:
  _limit('RLIMIT_CORE', 0)
  _limit('RLIMIT_NOFILE', 64)
  _limit('RLIMIT_AS', memory_mb * 2**20)


def _limit_item_cpu(timeout_s: float) -> None:
  """Allows this process the CPU seconds it has used plus one item's."""
  _limit('RLIMIT_CPU', math.ceil(time.process_time() + timeout_s) + _CPU_GRACE_S)


def _is_worn(memory_mb: int) -> bool:
  """Whether its address space has grown past its share (ru_maxrss would start at the trainer's)."""
  try:
    with open('/proc/self/statm', 'rb') as statm:
      pages = int(statm.read().split()[0])
  except OSError:  # macOS
    return False
  return pages * resource.getpagesize() > _WORN_SHARE * memory_mb * 2**20


def _take_pipes() -> tuple[int, int]:
  """Moves the pipes away from fds 0 and 1, so that no library's print or input can touch the protocol."""
  inbox, outbox = os.dup(0), os.dup(1)
  nothing = os.open(os.devnull, os.O_RDWR)
  os.dup2(nothing, 0)
  os.dup2(nothing, 1)
  return inbox, outbox


def _die_with(parent: int) -> None:
  """Asks the kernel to end this process when the template ends (Linux; elsewhere its CPU limit must do)."""
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(_END)


def _send(outbox: int, *message) -> None:
  data = memoryview(json.dumps(message).encode() + b'\n')
  while data:
    data = data[os.write(outbox, data):]


def _load(library: str, outbox: int) -> None:
  """Imports it outside any item's time. Ends the worker if it cannot be had."""
  try:
    functions.LIBRARIES[library]()
  except BaseException as error:
    _send(outbox, 'failed', f'{library} cannot be loaded: {type(error).__name__}: {error}')
    raise


def _grade(kind: str, response: str, reference: str) -> tuple[str, float, bool]:
  """(verdict, format reward, whether the process is fit for another item)."""
  try:
    return *functions.grade(kind, response, reference), True
  except MemoryError:  # what was allocated may be lost for good
    return verdicts.CRASH, functions.format_reward(response), False
  except Exception:  # RecursionError among them: counted as a crash of the item, the process is sound
    return verdicts.CRASH, functions.format_reward(response), True


def _chunk(line: bytes) -> list:
  """The items of a request; none if it is for another child, or was cut off by the end of one."""
  try:
    child, chunk = json.loads(line)
  except ValueError:
    return []
  return chunk if child == os.getpid() else []


def _serve(inbox: int, outbox: int, timeout_s: float, memory_mb: int) -> int:
  """The child: grades until the parent closes its side (`_END`) or another child is wanted (`_LEAVE`, `_LOAD`)."""
  for line in os.fdopen(inbox, 'rb'):
    for index, kind, response, reference, terms in _chunk(line):
      _limit_item_cpu(timeout_s)
      if library := functions.missing_library(kind, response, reference, terms):
        _send(outbox, 'loading')
        return _LOAD[library]
      start = time.perf_counter()
      if terms:
        _send(outbox, 'scores', index, [text_terms.score(term, response) for term in terms])
      verdict, form, fit = _grade(kind, response, reference)
      _send(outbox, 'result', index, verdict, form, time.perf_counter() - start)
      if not fit or _is_worn(memory_mb):
        _send(outbox, 'leaving')
        return _LEAVE
  return _END


def _child(inbox: int, outbox: int, timeout_s: float, memory_mb: int, template: int) -> None:
  """Never returns: nothing of the template's may run twice."""
  status = _LEAVE
  try:
    _die_with(template)
    _limit('RLIMIT_FSIZE', _MAX_FILE_BYTES)
    status = _serve(inbox, outbox, timeout_s, memory_mb)
  except BrokenPipeError:
    status = _END  # the parent went away while a result was written
  finally:
    os._exit(status)


def main(timeout_s: float, memory_mb: int) -> None:
  _limit_process(memory_mb)
  code.configure(timeout_s, memory_mb)
  inbox, outbox = _take_pipes()
  template = os.getpid()
  while True:
    gc.freeze()  # what is shared with the children stays shared
    child = os.fork()
    if child == 0:
      _child(inbox, outbox, timeout_s, memory_mb, template)
    _send(outbox, 'ready', child)
    os.dup2(1, 2)  # stderr is for a failing start; later it is libraries' chatter, without end
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == _END:
      return
    library = next((name for name, number in _LOAD.items() if number == status), None)
    if library:
      _load(library, outbox)
    elif status != _LEAVE:
      _send(outbox, 'died')


if __name__ == '__main__':
  try:
    main(float(sys.argv[1]), int(sys.argv[2]))
  except BrokenPipeError:
    pass  # the parent went away while a result was written
