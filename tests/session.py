"""What the processes of a test session share: how programs are compiled, where compiled ones are kept, and a folder.

Programs are compiled quickly, as most of them run for milliseconds: a GRPO update of two layers takes 1.2 CPU seconds
with FLAGS and 8.2 without, and its numbers differ by rounding. What is compiled is kept for the session, or for longer
where JAX_COMPILATION_CACHE_DIR is set.
"""

import atexit
import functools
import importlib.util
import mmap
import os
import pathlib
import shutil
import tempfile

SCRATCH = 'MOE_RL_TESTS_SCRATCH'
# Level 0 is LLVM's; kernels come from the older, smaller emitters, all in one module.
FLAGS = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True,
         'xla_cpu_use_fusion_emitters': False, 'xla_cpu_parallel_codegen_split_count': 1}
# XLA's own values of them.
DEFAULTS = {'xla_backend_optimization_level': 3, 'xla_llvm_disable_expensive_passes': False,
               'xla_cpu_use_fusion_emitters': True, 'xla_cpu_parallel_codegen_split_count': 32}


def begin():
  """Sets the environment, before jax is imported; in a process that another of the session has started it is set."""
  if SCRATCH in os.environ:
    return
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # set it to gpu or tpu to test there
  if os.environ['JAX_PLATFORMS'] == 'cpu':
    os.environ.setdefault('XLA_FLAGS', flags())
  os.environ[SCRATCH] = tempfile.mkdtemp(prefix='moe_rl_tests_')
  atexit.register(shutil.rmtree, scratch(), ignore_errors=True)
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(scratch() / 'compiled'))
  os.environ |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0'}


def scratch() -> pathlib.Path:
  """A folder that lives as long as the session."""
  return pathlib.Path(os.environ[SCRATCH])


@functools.cache
def known() -> tuple[str, ...]:
  """The names in FLAGS that the installed XLA knows: it ends a process that names another. A name it has dropped can
  still be in its library, as a part of other text."""
  library = pathlib.Path(importlib.util.find_spec('jaxlib').origin).with_name('libjax_common.so')
  if not library.exists():
    return ()
  with library.open('rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as code:
    return tuple(name for name in FLAGS if code.find(b'\0%s\0' % name.encode()) >= 0)


def flags() -> str:
  return ' '.join(f'--{name}={str(FLAGS[name]).lower()}' for name in known())


def as_in_a_run() -> dict:
  """The compiler_options of what is to be compiled as in a run."""
  return {name: DEFAULTS[name] for name in known()}
