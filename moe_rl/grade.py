"""Grades a file of predictions with the code and the limits of training.

`python -m moe_rl.grade FILE.jsonl --reward=math [--out=FILE]`

Each line (or element of a JSON array) has a `prediction`, a model's raw output or a bare answer, and a `reference`.
Where the answer stands in an output is told in `moe_rl/rl/rewards/extract.py`. The lines are written to --out in their
order, with `verdict` (correct, wrong, unparsable_answer, unparsable_reference, timeout, crash), `reward` (1.0 or 0.0)
and `seconds` added. A line that cannot be graded is named with its number and cause, and is not written; the status
is then 1.

--reward is a kind of problem, or one of the terms that judge a text alone: `format`, `language` (the reference is the
language, such as en), `language:en` or `repetition`; then `reward` is the term's score, and the best one is `correct`.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import statistics
import sys
import time

import tqdm

from moe_rl.data.problem_files import DataError, Float, Record, clip, field_names, nearest, no_object, read_records
from moe_rl.rl.rewards import extract, functions, language, pool, terms, text_terms, verdicts

TEXT_TERMS = ('format', *text_terms.TERMS)
_TEXT_KINDS = ('integer', 'math', 'exact')


def main(argv: list[str] | None = None) -> int:
  """Status: 0; 1 if lines could not be graded; 2 if none could."""
  arguments = _parse(argv)
  try:
    check_reward(arguments.reward)
    records = read_records(pathlib.Path(arguments.file).expanduser())
    out = arguments.out and writable(pathlib.Path(arguments.out).expanduser())
    graders = pool.RewardPool(arguments.workers, arguments.timeout_s, arguments.memory_mb)
  except ValueError as error:  # DataError among them
    print(f'error: {error}', file=sys.stderr)
    return 2
  lines, items, faults = [], [], []
  for record in records:
    try:
      items.append(read_item(record, arguments.reward))
      lines.append(record.value)
    except DataError as error:
      faults.append(f'{arguments.file}:{record.line}: {error}')
  started = time.monotonic()
  with graders, tqdm.tqdm(total=len(items), unit='line', mininterval=0.5, disable=None) as bar:
    grades = graders.grade(items, tick=bar.update)
  elapsed = time.monotonic() - started
  grades = [scored(arguments.reward, grade) for grade in grades]
  print(report(arguments, grades, elapsed))
  if out:
    write(out, lines, grades)
  for fault in faults:
    print(fault, file=sys.stderr)
  if faults:
    print(f'{len(faults)} of {len(records)} lines could not be graded', file=sys.stderr)
  return (1 if items else 2) if faults else 0


def _parse(argv):
  parser = argparse.ArgumentParser(prog='python -m moe_rl.grade', description=__doc__.split('\n')[0])
  parser.add_argument('file', help='JSON lines, or one JSON array, with `prediction` and `reference`')
  parser.add_argument('--reward', default='math',
                      help=f'one of {", ".join([*functions.ACCURACY, *TEXT_TERMS])}; default: math')
  parser.add_argument('--out', help='where to write the lines with verdict and reward')
  parser.add_argument('--workers', type=int, default=pool.WORKERS, help='processes; default: %(default)s')
  parser.add_argument('--timeout_s', type=float, default=pool.TIMEOUT_S, help='seconds a line; default: %(default)s')
  parser.add_argument('--memory_mb', type=int, default=pool.MEMORY_MB, help='a worker, MiB; default: %(default)s')
  return parser.parse_args(argv)


def read_item(record: Record, kind: str) -> pool.Item:
  """What is to be graded in one line. Raises DataError, saying why, for a line without both fields."""
  if record.why:
    raise DataError(record.why)
  fields = record.value
  if not isinstance(fields, dict):
    raise DataError(no_object(fields, 'prediction', 'reference'))
  for key in ('prediction', 'reference'):
    if key not in fields:
      raise DataError(f'field {key!r} is missing (the line has {field_names(fields)}): add it, or rename the field')
  prediction, reference = (_text(fields, key, kind) for key in ('prediction', 'reference'))
  if kind in functions.ACCURACY:
    return pool.Item(kind, functions.as_response(kind, prediction), reference)
  term = f'{kind}:{reference}' if kind == 'language' else kind
  _check_language(term)
  if kind != 'format' and not any(tag in prediction for tag in extract.TAGS):
    prediction = f'<think>{prediction}</think>'  # a bare text is what the term is about
  return pool.Item('exact', prediction, '-', () if kind == 'format' else (term,))


def _check_language(term: str):
  name, _, argument = term.partition(':')
  if name == 'language':
    try:
      language.check_target(argument)
    except ValueError as error:
      raise DataError(str(error)) from None


def check_reward(name: str):
  """Raises ValueError unless it is a kind of problem or a term of text, naming the nearest."""
  term = name.partition(':')[0]
  if name in functions.ACCURACY or name in ('format', 'language'):
    return
  if term in text_terms.TERMS:
    terms.parse(f'{name}=1')
    return
  known = (*functions.ACCURACY, *TEXT_TERMS)
  raise ValueError(f'unknown reward {name!r}{nearest(name, known)}: use one of {", ".join(known)}')


def scored(reward: str, grade: pool.Grade) -> pool.Grade:
  """A term's score in place of the verdict on an answer; a grade of a kind of problem as it is."""
  if reward in functions.ACCURACY:
    return grade
  score = grade.format if reward == 'format' else grade.scores[0]
  best = 0.0 if reward.startswith('repetition') else 1.0
  verdict = grade.verdict
  if verdict not in (verdicts.TIMEOUT, verdicts.CRASH):
    verdict = verdicts.CORRECT if score == best else verdicts.WRONG
  return dataclasses.replace(grade, verdict=verdict, accuracy=score)


def _text(fields: dict, key: str, kind: str) -> str:
  """A field as text. Nothing (null) is no answer, or no reference; a list of answers is one answer of several parts;
  objects are references as the rule reads them."""
  value = fields[key]
  if isinstance(value, list) and kind in _TEXT_KINDS:
    return ', '.join(_text({key: part}, key, kind) for part in value)
  if isinstance(value, (list, dict)):
    if key == 'prediction':
      raise DataError(f"field 'prediction' is {clip(json.dumps(value, default=str))}, not text: write it as a string")
    return json.dumps(value, default=_plain)
  if isinstance(value, Float):
    return value.literal
  return '' if value is None else str(value)


def _plain(number: Float) -> float:
  return float(number.literal)


def writable(path: pathlib.Path) -> pathlib.Path:
  """A file that can be written, its folder made if it is missing. Raises ValueError before anything is graded."""
  if path.is_dir():
    raise ValueError(f'--out={path} is a folder: name a file in it')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f'--out={path}: its folder cannot be made ({error.strerror}): name another') from None
  if not os.access(path.parent, os.W_OK):
    raise ValueError(f'--out={path}: its folder cannot be written: name another')
  return path


def write(path: pathlib.Path, lines: list[dict], grades: list[pool.Grade]):
  """One JSON object a line, ASCII only; the file is whole or not there."""
  partial = path.with_name(path.name + '.partial')
  with partial.open('w') as out:
    for fields, grade in zip(lines, grades, strict=True):
      added = {'verdict': grade.verdict, 'reward': grade.accuracy, 'seconds': round(grade.seconds, 6)}
      out.write(json.dumps({**fields, **added}, default=_plain) + '\n')
  os.replace(partial, path)


def report(arguments, grades: list[pool.Grade], elapsed: float) -> str:
  """Rates by verdict, mean reward with its standard error, and times."""
  count = len(grades)
  if not count:
    return f'{arguments.file}: no line to grade'
  counts = collections.Counter(pool.count_verdicts(grades))
  seconds = sorted(grade.seconds for grade in grades)
  graded = [grade.accuracy for grade in grades if grade.verdict != verdicts.UNPARSABLE_REFERENCE]
  mean = statistics.fmean(graded) if graded else math.nan
  error = statistics.stdev(graded) / math.sqrt(len(graded)) if len(graded) > 1 else math.nan
  lines = [f'{arguments.file}: {count} lines graded as {arguments.reward} in {elapsed:.1f} s by {arguments.workers} '
           f'workers, {count / max(elapsed, 1e-9):,.0f} a second']
  lines += [f'  {verdict:<20} {number:>8}  {number / count:7.2%}' for verdict, number in counts.items()]
  lines += [f'  reward               {mean:.4f} ± {error:.4f} over the {len(graded)} lines whose reference can be read',
            f'  milliseconds a line  median {1e3 * statistics.median(seconds):.2f}, 99th percentile '
            f'{1e3 * seconds[min(count - 1, int(0.99 * count))]:.2f}, longest {1e3 * seconds[-1]:.2f} '
            f'(limit {1e3 * arguments.timeout_s:g})']
  return '\n'.join(lines)


if __name__ == '__main__':
  sys.exit(main())
