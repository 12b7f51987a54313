"""CPU cores as devices. A small model's products are too short to be shared by threads: two cores with half the rows
each take less time than two threads on all rows (`benchmarks/README.md`)."""

import os

import jax

WIDEST = 256  # width of a model whose products are short; wider ones would also want their weights once


def cores() -> int:
  """Those that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def candidates(width: int) -> list[int]:
  """Numbers of devices to try, the best first, 1 last; 1 alone where XLA's flags say how many there are."""
  told = 'host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  return [n for n in (4, 2) if n <= cores() and width <= WIDEST and not told] + [1]


def split(devices: int):
  """As many CPU devices; without effect on other platforms, and once jax has its devices."""
  if devices == 1:
    return
  try:
    jax.config.update('jax_num_cpu_devices', devices)
  except RuntimeError:
    return
  if devices == cores():  # a thread each
    os.environ['XLA_FLAGS'] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
