"""Whether an experiment fits a TPU slice, how fast it can run there, and what it costs. Needs no TPU.

`python -m moe_rl.plan --config=experiments/r1_zero.py:v3_671b --topology=v5p:8x8x16 [--json=FILE] [--suggest]
[--config.key=value …]`

The exit status is 0 if every program fits, 1 if one does not, 2 on bad input.
"""

import json
import os
import pathlib
import signal
import sys
import time

from absl import app, flags

from moe_rl import main as entry  # defines --config
from moe_rl.main import fail
from moe_rl.refusals import refuse

_TOPOLOGY = flags.DEFINE_string('topology', '', 'The slice, in chips: v5p:8x8x16, v5e:4x4, tpu7x:4x8x8 …')
_JSON = flags.DEFINE_string('json', '', 'A file for the plan as JSON.')
_SUGGEST = flags.DEFINE_bool('suggest', False, 'Try meshes and remat policies; rank those that fit.')
_TRIES = flags.DEFINE_integer('tries', 6, 'How many candidates --suggest compiles at most.', lower_bound=1)
_MINUTES = flags.DEFINE_float('minutes', 15.0, 'After which --suggest begins no further candidate.', lower_bound=0.0)
_ONLY = flags.DEFINE_list('only', [], 'Names of the programs to compile; all if empty.')
_MEAN = flags.DEFINE_float('mean_tokens', 0.0, 'Mean tokens of a response; 0: the longest allowed.', lower_bound=0.0)
_PROMPT = flags.DEFINE_integer('prompt_tokens', 1024, 'Longest prompt, where the config leaves it to the task.',
                               lower_bound=1)
_PRICE = flags.DEFINE_float('price', None, '$ a chip-hour; default: moe_rl/planner/prices.py.', lower_bound=0.0)
PATIENCE = 600.0
_PATIENCE = flags.DEFINE_float('patience', PATIENCE, 'Seconds after which code generation is cut off.', lower_bound=0.0)
FLAGS = ('config', 'topology', 'json', 'suggest', 'tries', 'minutes', 'only', 'mean_tokens', 'prompt_tokens', 'price',
         'patience')


def plan(config, topology, *, mean_tokens=None, prompt_tokens=1024, price=None, only=(), patience=PATIENCE,
         progress=None) -> dict:
  """The plan of an experiment's config on a `topologies.Topology`, as `report.as_json`. Raises ValueError on bad
  input."""
  from moe_rl.planner import estimate, programs, report
  from moe_rl.planner.compile import compile_all
  config = programs.for_planning(config, prompt_tokens)
  mesh, sized = programs.check(config, topology.devices)
  used, assumed = estimate.loads(sized, mean_tokens)
  done = compile_all(topology, 'moe_rl.planner.programs:make', {'config': config.to_dict()}, only=only,
                     patience=patience, progress=progress)
  if not done.programs:
    raise ValueError(f'--only={",".join(only)}: no such program; there are init, {", ".join(used)}')
  rows = estimate.rows(done, topology, used)
  run = {} if only else estimate.run(rows, topology, sized, price)
  return report.as_json(topology, mesh, rows, run, [*assumed, *done.notes, *programs.not_by_hosts(sized, topology)])


def main(argv):
  from moe_rl.planner import report, topologies
  if len(argv) > 1:
    fail(f"what is '{argv[1]}'? Flags look like --topology=v5p:8x8x16")
  config = flags.FLAGS.config
  if config is None:
    fail('give an experiment: --config=experiments/r1_zero.py:v3_671b')
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the compiler's process ends too
  options = dict(mean_tokens=_MEAN.value or None, prompt_tokens=_PROMPT.value, price=_PRICE.value,
                 patience=_PATIENCE.value, progress=Progress())
  try:
    topology = topologies.parse(_TOPOLOGY.value)
    check_writable(_JSON.value)
    if _SUGGEST.value:
      from moe_rl.planner.suggest import suggest, table
      whole = suggest(config, topology, plan, tries=_TRIES.value, minutes=_MINUTES.value, options=options)
      shown = table(whole)
      unfit = '' if any(f['fits'] for f in whole['suggestions']) else 'nothing that was tried fits: take more chips'
    else:
      whole = plan(config, topology, only=_ONLY.value, **options)
      shown, unfit = report.text(whole), report.remedy(whole)
    if _JSON.value:
      pathlib.Path(_JSON.value).write_text(json.dumps(whole, indent=1) + '\n')
  except (ValueError, OSError) as e:
    options['progress'].end()
    fail(e)
  options['progress'].end()
  print(shown)
  if unfit:
    print(unfit, file=sys.stderr)
  sys.exit(1 if unfit else 0)


def check_writable(path: str):
  """Raises ValueError, with the flag, where --json could not be written: before minutes of compiling."""
  folder = pathlib.Path(path).parent
  refuse(path and not (folder.is_dir() and os.access(folder, os.W_OK)),
         f'--json={path}: {folder} is no folder that can be written to')
  refuse(path and pathlib.Path(path).is_dir(), f'--json={path}: that is a folder, name a file')


class Progress:
  """One line on stderr that says what is compiled and for how long: rewritten on a terminal, every half minute else."""

  def __init__(self):
    self.last, self.shown = ('', 0.0), False

  def __call__(self, what: str, seconds: float):
    terminal = sys.stderr.isatty()
    if what == self.last[0] and time.time() - self.last[1] < (0.5 if terminal else 30):
      return
    self.last, self.shown = (what, time.time()), terminal
    print(f'\r\033[K{what}, {seconds:.0f} s' if terminal else f'{what}, {seconds:.0f} s', end='' if terminal else '\n',
          file=sys.stderr, flush=True)

  def end(self):
    if self.shown:
      print('\r\033[K', end='', file=sys.stderr)


def parse_flags(argv: list[str]) -> list[str]:
  try:
    argv = with_slice(argv)
  except ValueError as e:
    fail(e)
  return entry.parse_flags(argv, FLAGS)


def with_slice(argv: list[str]) -> list[str]:
  """argv with `PRESET@SLICE` for its PRESET, where the experiment has a table, `SLICES`, for --topology; says so."""
  given = dict(entry.named(argv[1:]))
  experiment, topology = given.get('config', ''), given.get('topology', '').strip().lower()
  path, _, preset = experiment.partition(':')
  tables = getattr(entry.experiment_module(path), 'SLICES', {}).get(preset, {}) if path else {}
  if topology in tables:
    print(f'{preset} as the table of {path} has it for this slice: {experiment}@{topology}', file=sys.stderr)
    return [a[:-len(experiment)] + f'{experiment}@{topology}' if a.endswith(experiment) else a for a in argv]
  if tables and topology:
    print(f'{path} has no table of {preset} for {topology} (it has {", ".join(tables)}), so the mesh is config.mesh; '
          '--suggest finds one', file=sys.stderr)
  return argv


if __name__ == '__main__':
  from moe_rl.planner.topologies import set_environment
  set_environment()
  app.run(main, flags_parser=parse_flags)
