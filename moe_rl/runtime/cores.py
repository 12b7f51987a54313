"""CPU cores as devices. A small model's products are too short to be shared by threads: two cores with half the rows
each take less time than two threads on all rows (`benchmarks/README.md`)."""

import ctypes
import os
import sys

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
WIDEST = 256  # width of a model whose products are short; wider ones would also want their weights once


def cores() -> int:
  """Those that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def candidates(width: int) -> list[int]:
  """Numbers of devices to try, the best first, 1 last; 1 alone where XLA's flags say how many there are."""
  told = 'host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  return [n for n in (4, 2) if n <= cores() and width <= WIDEST and not told] + [1]


def keep_memory():
  """Has glibc keep freed memory rather than hand it back to the kernel, which XLA asks for again a moment later: 18,600
  page faults an update of the tiny model. Without effect under another C library."""
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
  if mallopt:
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**30)


def split(devices: int):
  """As many CPU devices; without effect on other platforms, and once jax has its devices."""
  if devices == 1:
    return
  try:
    jax.config.update('jax_num_cpu_devices', devices)
  except RuntimeError:
    return
  keep_memory()
  if devices == cores():  # a thread each
    os.environ['XLA_FLAGS'] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
