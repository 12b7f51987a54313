"""Several stages one after another, each in a folder of its own, each taking what an earlier one made: R1 as a list.

    workdir/NAME/            a stage, as if it had been run alone
    workdir/evaluations/ROW/ the evaluation of a stage's weights
    workdir/table.md         the rows so far, one a stage that trains the policy
    workdir/compiled/        compiled programs, so that stages of equal shapes compile once

A run that ended anywhere goes on there: finished stages give their summary, the one that was interrupted resumes.
"""

import gc
import importlib
import json
import pathlib
import re
import time

import jax
import ml_collections

from moe_rl import config as configs
from moe_rl import validation
from moe_rl.models.checkpoints import open_checkpoint
from moe_rl.models.config import own_fields
from moe_rl.refusals import refuse
from moe_rl.runtime import hosts
from moe_rl.runtime.mesh import make_mesh
from moe_rl.runtime.run import replace

COLUMNS = (  # heading, key of the evaluation's record, format
  ('pass@1', 'pass@1', '.3f'), ('±', 'pass@1_se', '.3f'), ('format', 'format', '.3f'),
  ('language', 'language', '.3f'), ('thinking tokens', 'thinking_tokens', '.1f'), ('truncated', 'truncated', '.3f'))


def resolved(section: ml_collections.ConfigDict, workdir: pathlib.Path, names) -> ml_collections.ConfigDict:
  """A copy in which `{name}` in any text stands for the folder of the stage of that name."""
  folders = {name: str(workdir / name) for name in names}

  def put(value):
    if isinstance(value, dict):
      return {k: put(v) for k, v in value.items()}
    if isinstance(value, str):
      return re.sub(r'\{(\w+)\}', lambda m: folders.get(m[1], m[0]), value)
    return value
  copy = section.copy_and_resolve_references()
  with copy.unlocked():
    copy.update(put(copy.to_dict()))
  return copy


def run(config, workdir) -> dict:
  """Runs config.order to its end, or to where it is stopped; returns (and writes) the summary of all."""
  path = pathlib.Path(workdir).absolute()
  claim(path, config)
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(path / 'compiled'))
  started, summaries, rows, complete = time.time(), {}, {}, True
  for name, init_from in config.given.items():  # what the stages begin from, and no stage makes
    rows[name] = evaluate(config, path, name, init_from)
  for name in config.order:
    section = resolved(config.stages[name], path, config.order)
    print(f'\n== {name}: {section.stage}', flush=True)
    summaries[name] = run_stage(section, path / name)
    gc.collect()  # the last stage's arrays
    complete = summaries[name].get('complete', True)
    if not complete:
      print(f'stopped in {name}; the same command goes on there', flush=True)
      break
    if name in config.rows:
      rows[name] = evaluate(config, path, name, str(path / name))
      write_table(path, rows)
  summary = {'complete': complete, 'rows': rows, 'stages': summaries, 'seconds': seconds_of(summaries, rows),
             'seconds_of_this_call': time.time() - started}
  if jax.process_index() == 0:
    replace(path / 'summary.json', json.dumps(summary, indent=1) + '\n')
    print('\n' + write_table(path, rows), flush=True)
  return summary


def run_stage(section, workdir: pathlib.Path) -> dict:
  """The summary of one stage, on a mesh of its own of all devices; its files are there for all hosts."""
  mesh = make_mesh(configs.mesh_sizes(section, jax.device_count()))
  return hosts.first(importlib.import_module(f'moe_rl.stages.{section.stage}').run(section, workdir, mesh))


def evaluate(config, path: pathlib.Path, row: str, init_from: str) -> dict:
  """The record of these weights' evaluation: config.evaluation with their own sizes."""
  section = config.evaluation.copy_and_resolve_references()
  with section.unlocked():
    section.init_from, section.model = init_from, own_fields(open_checkpoint(init_from).model)
  print(f'\n== evaluation of {row}', flush=True)
  return run_stage(section, path / 'evaluations' / row)


def seconds_of(summaries: dict, rows: dict) -> float:
  """Of all stages and evaluations, over all calls."""
  return sum(s.get('seconds', 0.0) for s in (*summaries.values(), *rows.values()))


def write_table(path: pathlib.Path, rows: dict) -> str:
  """The rows as Markdown, written to table.md and returned."""
  lines = ['| stage | ' + ' | '.join(heading for heading, *_ in COLUMNS) + ' |', '| --- ' * (len(COLUMNS) + 1) + '|']
  for name, record in rows.items():
    cells = (format(record[key], form) if key in record else '-' for _, key, form in COLUMNS)
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  text = '\n'.join(lines) + '\n'
  if jax.process_index() == 0:
    replace(path / 'table.md', text)
  return text


def claim(path: pathlib.Path, config):
  """Raises ValueError if the folder cannot be written or belongs to another pipeline. Stages compare their own keys."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    kept = path / 'order.json'
    order = list(config.order)
    if kept.exists() and json.loads(kept.read_text()) != order:
      raise ValueError(f'--workdir {path} belongs to another list of stages: {json.loads(kept.read_text())}, this one '
                       f'is {order}. Use another workdir')
    if jax.process_index() == 0:
      replace(kept, json.dumps(order))
  except OSError as e:
    raise ValueError(f'--workdir {path}: cannot be written ({e.strerror}): choose another folder') from e


def validate(config, devices: int, vocab_size: int, processes: int = 1) -> dict:
  """Checks every stage's config before the first one begins. Raises ValueError naming the stage."""
  for name in config.order:
    refuse(name not in config.stages, f"config.order names '{name}', which config.stages has not: it has "
                                      f"{', '.join(config.stages)}")
  for name in config.rows:
    refuse(name not in config.order, f"config.rows names '{name}', which is not in config.order")
  for name in (*config.order, 'evaluation'):
    section = config.evaluation if name == 'evaluation' else config.stages[name]
    try:
      validation.validate(section, devices, vocab_size, processes)
    except ValueError as e:
      raise ValueError(f'{name}: {e}') from e
  return {'stages': ' -> '.join(config.order), 'rows': ', '.join((*config.given, *config.rows))}
