r"""Problems with gold answers from files: GSM8K, MATH, Countdown, the 24 game, and data of your own.

  problems = load_problems('gsm8k/train.jsonl')

reads every record and checks every gold answer before it returns, so that a bad line costs a second at the
start and not a run in the middle. `python -m moe_rl.data.problems FILE` prints what a file holds and each bad
line.

The formats are in `problem_formats`; 'auto' tells them apart by the fields of the first record and by the file name.
JSON is one object a line, or one array of objects. What training cannot use for want of a gold answer alone is left
out, counted and named; any other bad record refuses the file.
"""

import argparse
import collections
import dataclasses
import logging
import os
import pathlib
import sys

from moe_rl.data.problem_files import SHOWN, BadRecord, BadReference, DataError, clip, nearest, read_records
from moe_rl.data.problem_formats import FORMATS, PARSERS, guess_format, parse_csv_countdown

_MAX_MATH_CHARS, _MAX_MATH_DEPTH, _MAX_MATH_BARS = 500, 8, 12
_NAMED = 20  # problems left out that a note names


@dataclasses.dataclass(frozen=True)
class Problem:
  """One question with its gold answer.

  id: position of the record in its file, from 0, blank lines not counted; randomness is addressed by it.
  question: text for the template, without outer white space.
  reference: gold answer as text, in the form that the accuracy function `kind` reads.
  kind: name of an accuracy function, see `moe_rl/rl/rewards/functions.py`.
  level: how hard it is, as the file or the task says, such as '5'; '' where nothing is said.
  """

  id: int
  question: str
  reference: str
  kind: str
  level: str = ''


@dataclasses.dataclass(frozen=True)
class Fault:
  """One bad record: its line in the file, from 1, and why it is bad with the remedy.

  gold_only: nothing is wrong with it but that its gold answer is absent or cannot be read.
  """

  line: int
  why: str
  gold_only: bool = False


@dataclasses.dataclass(frozen=True)
class Scan:
  """All that a file holds, read as `format`: every record is either in `problems` or in `faults`."""

  path: str
  format: str
  problems: tuple[Problem, ...]
  faults: tuple[Fault, ...]


def load_problems(path, fmt='auto') -> list[Problem]:
  """All problems of a file that can be trained on, in its order; those left out are told in the log. As
  `usable_problems`, which gives their count."""
  usable = usable_problems(path, fmt)
  if usable.notes:
    logging.getLogger(__name__).warning('\n'.join(usable.notes))
  return usable.problems


@dataclasses.dataclass(frozen=True)
class Usable:
  """problems: those that can be trained on, in the file's order; left_out: how many for want of a gold answer that can
  be read; notes: lines for the log that name them."""

  problems: list[Problem]
  left_out: int
  notes: list[str]


def usable_problems(path, fmt='auto') -> Usable:
  """What a run can use of a file.

  Raises DataError, quoting up to 5 records, if one is bad in any other way, or if no problem is left.
  """
  scan = scan_problems(path, fmt)
  if not scan.problems or not all(fault.gold_only for fault in scan.faults):
    raise _refusal(scan)
  left, notes = len(scan.faults), []
  if left:
    notes = [f'left out {left} of {left + len(scan.problems)} problems of {scan.path}, whose gold answer is absent or '
             'cannot be read:']
    notes += [f'  {scan.path}:{fault.line}: {fault.why}' for fault in scan.faults[:_NAMED]]
  if left > _NAMED:
    notes.append(f'  and {left - _NAMED} more; `python -m moe_rl.data.problems {scan.path}` lists all')
  return Usable(list(scan.problems), left, notes)


def _refusal(scan) -> DataError:
  total = len(scan.faults) + len(scan.problems)
  lines = [f'{scan.path}: {len(scan.faults)} of {total} records cannot be used (read as {scan.format}):']
  first = sorted(scan.faults, key=lambda fault: fault.gold_only)[:SHOWN]
  lines += [f'  {scan.path}:{fault.line}: {fault.why}' for fault in sorted(first, key=lambda fault: fault.line)]
  if len(scan.faults) > SHOWN:
    lines.append(f'  and {len(scan.faults) - SHOWN} more')
  lines.append(f'Mend or delete them; `python -m moe_rl.data.problems {scan.path}` lists every one.')
  return DataError('\n'.join(lines))


def scan_problems(path, fmt='auto') -> Scan:
  """Reads a file whole and sorts its records into problems and faults; a bad record is no error here.

  Raises DataError where there is nothing to sort: no such file, a directory, an empty file, an unknown
  format, or, for 'auto', fields of no format.
  """
  if fmt != 'auto' and fmt not in FORMATS:
    known = ', '.join(('auto', *FORMATS))
    raise DataError(f'data format {fmt!r} is unknown{nearest(fmt, FORMATS)}: choose one of {known}')
  path = pathlib.Path(os.path.expanduser(path))
  is_csv = path.suffix.lower() == '.csv'
  records = read_records(path)
  fmt = guess_format(path, records, is_csv) if fmt == 'auto' else fmt
  puzzles = is_csv and fmt == 'countdown' and 'Puzzles' in (records[0].value or ())  # the 24 game's file
  parse = parse_csv_countdown if puzzles else PARSERS[fmt]
  parsed, faults = [], []
  for index, record in enumerate(records):
    try:
      if record.why:
        raise BadRecord(record.why)
      problem = Problem(index, *parse(record.value))
      _check_kind(problem.kind)
      if problem.kind == 'math':
        _refuse_labyrinth(problem.reference)
      parsed.append((record.line, problem))
    except BadRecord as bad:
      faults.append(Fault(record.line, str(bad), isinstance(bad, BadReference)))
  why = _check_references([problem for _, problem in parsed])
  faults += [Fault(line, said, True) for (line, _), said in zip(parsed, why, strict=True) if said]
  problems = [problem for (_, problem), said in zip(parsed, why, strict=True) if not said]
  return Scan(str(path), fmt, tuple(problems), tuple(sorted(faults, key=lambda fault: fault.line)))


def _check_kind(kind):
  from moe_rl.rl.rewards import functions

  if kind not in functions.ACCURACY:
    raise BadRecord(f'kind {clip(kind)} is no accuracy function{nearest(kind, functions.ACCURACY)}: '
                    f'choose one of {", ".join(sorted(functions.ACCURACY))}')


def _check_references(problems):
  """What is wrong with each reference, or None; those that could hold up the reader are read in killable workers."""
  from moe_rl.rl.rewards import pool

  with pool.RewardPool() as graders:  # which start if they are needed
    why = graders.check([(problem.kind, problem.reference) for problem in problems])
  return [said and f'{said}: write the final answer alone, or use format jsonl and name another kind' for said in why]


def _refuse_labyrinth(reference):
  """Raises BadRecord for what would hold up math-verify, which takes seconds at 20 nested brackets.

  The answers of MATH have at most 159 characters, 3 nested brackets and no bar.
  """
  depth = deepest = 0
  for char in reference:
    depth += (char in '([{') - (char in ')]}')
    deepest = max(deepest, depth)
  for count, limit, what in (
    (len(reference), _MAX_MATH_CHARS, 'characters'),
    (deepest, _MAX_MATH_DEPTH, 'nested brackets'),
    (reference.count('|'), _MAX_MATH_BARS, 'bars |'),
  ):
    if count > limit:
      size = f'{count} {what}, over the limit of {limit}'
      raise BadReference(f'reference {clip(reference)} has {size}: write the final answer alone')


def main(argv=None):
  """Prints what a file holds; returns 1 if a record is bad or the file cannot be read, else 0."""
  parser = argparse.ArgumentParser(prog='python -m moe_rl.data.problems', description='Checks a data file.')
  parser.add_argument('file')
  parser.add_argument('--format', default='auto', choices=('auto', *FORMATS))
  args = parser.parse_args(argv)
  try:
    scan = scan_problems(args.file, args.format)
  except DataError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  kinds = collections.Counter(problem.kind for problem in scan.problems)
  print(
    f'{scan.path}: format {scan.format}, {len(scan.problems)} problems, {len(scan.faults)} bad records',
    *(f'({kind}: {count})' for kind, count in sorted(kinds.items())),
  )
  for problem in scan.problems[:3]:
    print(f'\n[{problem.id}] {problem.question}\n    {problem.kind}: {problem.reference}')
  if scan.faults:
    print()
  for fault in scan.faults:
    print(f'{scan.path}:{fault.line}: {fault.why}')
  return 1 if scan.faults else 0


if __name__ == '__main__':
  try:
    status = main()
    sys.stdout.flush()
  except BrokenPipeError:  # `| head` has read enough; the interpreter's own last flush must not fail either
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 1
  sys.exit(status)
