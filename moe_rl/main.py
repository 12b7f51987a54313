"""The one entry: `python -m moe_rl.main --config=experiments/r1_zero.py[:preset] [--config.key=value …] [--workdir=DIR]`."""

import json
import pathlib
import sys
import time

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file('config', help_string='The experiment, e.g. experiments/r1_zero.py[:preset].')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Where the run lives; a run that is there goes on. Default: runs/EXPERIMENT.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'what is {argv[1]!r}? Flags look like --config.rl.steps=50')
  if _CONFIG.value is None:
    raise app.UsageError('give an experiment: --config=experiments/r1_zero.py')
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  name = pathlib.Path(flags.FLAGS['config'].config_filename.split(':')[0]).stem
  workdir = _WORKDIR.value or f'runs/{name}'
  try:
    summary = launch(config, workdir)
  except ValueError as e:  # bad input: the message is for a person, a traceback is not
    if '--debug' in sys.argv:
      raise
    print(f'error: {e}', file=sys.stderr)
    sys.exit(2)
  print(json.dumps(summary, indent=1))


def launch(config, workdir) -> dict:
  """Runs the config's stage in `workdir` and returns its summary. Raises ValueError on bad input, before any compile."""
  started = time.time()
  import jax

  from moe_rl import config as configs
  from moe_rl.data.tokenizer import load_tokenizer
  from moe_rl.runtime.mesh import make_mesh
  derived = configs.validate(config, jax.device_count(), load_tokenizer(config.tokenizer).vocab_size)
  width = max(map(len, derived))
  for key, value in {'backend': jax.default_backend(), **derived}.items():
    print(f'{key:>{width}}  {value:,}' if isinstance(value, int) else f'{key:>{width}}  {value}', flush=True)
  mesh = make_mesh(configs.mesh_sizes(config, jax.device_count()))
  if config.stage == 'pretrain':
    from moe_rl.stages import pretrain as stage
  else:
    from moe_rl.stages import rl as stage
  print(f'{"workdir":>{width}}  {pathlib.Path(workdir).absolute()}   ({time.time() - started:.1f} s to here)', flush=True)
  return stage.run(config, workdir, mesh)


if __name__ == '__main__':
  app.run(main)
