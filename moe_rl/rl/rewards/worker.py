"""A reward worker: reads items from stdin, grades them one by one, writes each verdict at once.

Started by `pool.RewardPool` as `python -m moe_rl.rl.rewards.worker TIMEOUT_S MEMORY_MB`, in a session of its
own. It may hang or die on any item; the pool sees that from outside, kills its process group and goes on.

Protocol, one JSON text a line, ASCII only (so NUL bytes and lone surrogates survive as escapes):
  in   [[index, kind, response, reference], ...]            a chunk, graded in order
  out  ["ready"]                                            may be sent items; also ends "loading"
       ["loading"]                                          importing math-verify: no item is in work
       ["result", index, verdict, format, seconds, leaving] leaving: this worker ends now, take back the rest
       ["failed", why]                                      cannot work on this machine at all
"""

import json
import math
import os
import resource
import sys
import time
from typing import BinaryIO

from moe_rl.rl.rewards import functions

# The pool's wall limit strikes first. The CPU limit ends a worker whose parent was killed in mid-item.
_CPU_GRACE_S = 2
# Enough for compiled modules written at import; no verifier has business writing more.
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
  _limit('RLIMIT_FSIZE', _MAX_FILE_BYTES)
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


def _take_pipes() -> tuple[BinaryIO, int]:
  """Moves the pipes away from fds 0 and 1, so that no library's print or input can touch the protocol."""
  inbox, outbox = os.dup(0), os.dup(1)
  nothing = os.open(os.devnull, os.O_RDWR)
  os.dup2(nothing, 0)
  os.dup2(nothing, 1)
  return os.fdopen(inbox, 'rb'), outbox


def _send(outbox: int, *message) -> None:
  data = memoryview(json.dumps(message).encode() + b'\n')
  while data:
    data = data[os.write(outbox, data):]


def _load(outbox: int) -> None:
  """Imports math-verify outside any item's time. Ends the worker with the reason if it cannot be had."""
  if functions.load_math_verify.cache_info().currsize:
    return
  _send(outbox, 'loading')
  try:
    functions.load_math_verify()
  except BaseException as error:
    _send(outbox, 'failed', f'math-verify cannot be loaded: {type(error).__name__}: {error}')
    raise
  _send(outbox, 'ready')


def _grade(kind: str, response: str, reference: str) -> tuple[str, float, bool]:
  """(verdict, format reward, whether the process is fit for another item)."""
  try:
    return *functions.grade(kind, response, reference), True
  except MemoryError:  # what was allocated may be lost for good
    return functions.CRASH, functions.format_reward(response), False
  except Exception:  # RecursionError among them: counted as a crash of the item, the process is sound
    return functions.CRASH, functions.format_reward(response), True


def main(timeout_s: float, memory_mb: int) -> None:
  _limit_process(memory_mb)
  inbox, outbox = _take_pipes()
  _send(outbox, 'ready')
  os.dup2(1, 2)  # stderr is for a failing start; later it is libraries' chatter, without end
  for line in inbox:  # ends when the parent closes its side or is gone
    for index, kind, response, reference in json.loads(line):
      if kind == 'math':
        _load(outbox)
      _limit_item_cpu(timeout_s)
      start = time.perf_counter()
      verdict, form, fit = _grade(kind, response, reference)
      seconds = time.perf_counter() - start
      leaving = not fit or _is_worn(memory_mb)
      _send(outbox, 'result', index, verdict, form, seconds, leaving)
      if leaving:
        return


if __name__ == '__main__':
  try:
    main(float(sys.argv[1]), int(sys.argv[2]))
  except BrokenPipeError:
    pass  # the parent went away while a result was written
