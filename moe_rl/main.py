"""The one entry.

`python -m moe_rl.main --config=experiments/r1_zero.py[:preset] [--config.key=value …] [--workdir=DIR]`
On several hosts the same on each: a TPU pod is found, others add --coordinator=HOST:PORT --processes=N --process=I.
"""

import difflib
import glob
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import traceback

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file('config', help_string='The experiment, e.g. experiments/r1_zero.py[:preset].')
_DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of bad input.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Where the run lives; one that is there goes on. Default: runs/NAME.')
_COORDINATOR = flags.DEFINE_string('coordinator', '', 'HOST:PORT of process 0, where several hosts are no TPU pod.')
_PROCESSES = flags.DEFINE_integer('processes', 0, 'How many processes there are, one a host.')
_PROCESS = flags.DEFINE_integer('process', -1, 'Which of them this is, from 0.')
_WAIT = flags.DEFINE_float('wait', 300, 'Seconds to wait for the other hosts at the start.', lower_bound=1)
FLAGS = ('config', 'workdir', 'debug', 'coordinator', 'processes', 'process', 'wait')


def main(argv):
  if len(argv) > 1:
    fail(f"what is '{argv[1]}'? Flags look like --config.rl.steps=50")
  if _CONFIG.value is None:
    fail('give an experiment: --config=experiments/r1_zero.py')
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  name = pathlib.Path(flags.FLAGS['config'].config_filename.split(':')[0]).stem
  workdir = _WORKDIR.value or f'runs/{name}'
  try:
    summary = launch(config, workdir, (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value), _WAIT.value)
  except Exception as e:
    bad_input = isinstance(e, ValueError) and not _DEBUG.value  # the message is for a person, a traceback is not
    end_with_hosts(e, bad_input)
    if not bad_input:
      raise
    fail(e)
  print(json.dumps(summary, indent=1))


def end_with_hosts(error: Exception, bad_input: bool):
  """Where other hosts are connected, says what happened and ends the process without waiting for them."""
  from moe_rl.runtime import hosts
  hosts.settle(error)
  if hosts.connected():
    if bad_input:
      print(f'error: {error}', file=sys.stderr)
    else:
      traceback.print_exception(error)
    hosts.leave(2 if bad_input else 1)


def fail(why):
  """Ends the program on bad input: one message, status 2."""
  print(f'error: {why}', file=sys.stderr)
  sys.exit(2)


def parse_flags(argv: list[str], names=FLAGS) -> list[str]:
  """absl's parser, with messages that name the nearest file, preset or key in place of its tracebacks."""
  try:
    check_flags(argv[1:])
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as e:
    near = difflib.get_close_matches(e.flagname.partition('.')[0], names, 1, 0.5)
    fail(f'there is no flag --{e.flagname}' + (f': did you mean --{near[0]}…?' if near else ': see --help'))
  except (ValueError, flags.Error) as e:
    fail(e)


def check_flags(arguments: list[str]):
  """Raises ValueError for an experiment, preset or key that is not there, or a value that does not fit its key."""
  given = named(arguments)
  experiment = dict(given).get('config')
  if not experiment:
    return
  config = load_experiment(*experiment.split(':', 1))
  for name, value in given:
    if name.startswith('config.'):
      check_value(name, value, find(config, name.removeprefix('config.')))


def named(arguments: list[str]) -> list[tuple[str, str]]:
  """(name, value) of the flags among them, from `--name=value` or `--name value`."""
  given = []
  for argument, following in zip(arguments, [*arguments, ''][1:], strict=True):
    name, equals, value = argument.partition('=')
    if name.startswith('-'):
      given.append((name.lstrip('-'), value if equals else following))
  return given


def check_value(name: str, value: str, default):
  """Raises ValueError unless `value` reads as the type of `default`."""
  if isinstance(default, ml_collections.ConfigDict):
    raise ValueError(f"--{name} is a section: set one of its keys, such as --{name}.{next(iter(default))}=…")
  kinds = {int: 'a whole number', float: 'a number'}
  if type(default) in kinds:
    try:
      type(default)(value)
    except ValueError as e:
      raise ValueError(f'--{name}={value}: give {kinds[type(default)]}; its default is {default}') from e


def find(config, key: str):
  """The value at a dotted key. Raises ValueError naming the nearest key if there is none."""
  keys = {}

  def walk(section, prefix):
    for name in section:
      keys[prefix + name] = section[name]
      if isinstance(section[name], ml_collections.ConfigDict):
        walk(section[name], f'{prefix}{name}.')
  walk(config, '')
  if key not in keys:
    same = [k for k in keys if k.rpartition('.')[2] == key.rpartition('.')[2]]  # right name, wrong section
    near = same or difflib.get_close_matches(key, keys, 1)
    raise ValueError(f'there is no config.{key}' + (
      f': did you mean --config.{near[0]}?' if near else ': moe_rl/config.py lists every key'))
  return keys[key]


def load_experiment(path: str, preset: str = ''):
  """An experiment file's config, from Python: `launch(load_experiment('experiments/r1_zero.py'), 'runs/mine')`.

  Raises ValueError if there is no such file or, from the experiment itself, no such preset.
  """
  return experiment_module(path).get_config(*[preset] if preset else [])


def experiment_module(path: str):
  """The module of an experiment file. Raises ValueError, with the nearest, if there is none."""
  if not (path.endswith('.py') and os.path.isfile(path)):
    near = difflib.get_close_matches(path, glob.glob(os.path.join(os.path.dirname(path), '*.py')), 1)
    raise ValueError(f"there is no experiment '{path}'" + (f': did you mean {near[0]}?' if near else
                                                           f': give a .py file, seen from {os.getcwd()}'))
  spec = importlib.util.spec_from_file_location('experiment', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def launch(config, workdir, place=('', 0, -1), wait_s: float = 300) -> dict:
  """Runs the config's stage in `workdir`, returns its summary. Raises ValueError on bad input, before any compile.

  place: (coordinator, processes, process) of this process among several; by default that of a TPU pod's host, or alone.
  wait_s: seconds to wait for the others.
  """
  import jax

  from moe_rl import validation
  from moe_rl.data.tokenizer import load_tokenizer
  from moe_rl.runtime import cores, hosts
  from moe_rl.stages import pipeline
  several = config.stage == 'pipeline'
  validate = pipeline.validate if several else validation.validate
  vocabulary = load_tokenizer(config.tokenizer).vocab_size
  where = hosts.from_flags(*place) or hosts.from_tpu()
  if not where and config.stage != 'pretrain':  # whose sums, in their order, made the base in the package
    cores.split(next(n for n in cores.candidates(widest(config)) if n == 1 or accepts(validate, config, n, vocabulary)))
  hosts.connect(where, wait_s)
  derived = validate(config, jax.device_count(), vocabulary, jax.process_count())
  width = max(map(len, derived))
  for key, value in {'backend': jax.default_backend(), **derived}.items():
    print(f'{key:>{width}}  {value:,}' if isinstance(value, int) else f'{key:>{width}}  {value}', flush=True)
  print(f'{"workdir":>{width}}  {pathlib.Path(workdir).absolute()}', flush=True)
  return pipeline.run(config, workdir) if several else pipeline.run_stage(config, workdir)


def widest(config) -> int:
  """Width of the model, or of the widest of several stages."""
  sections = config.stages.values() if config.stage == 'pipeline' else [config]
  return max(section.model.width for section in sections)


def accepts(validate, *arguments) -> bool:
  try:
    validate(*arguments)
  except ValueError:
    return False
  return True


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
