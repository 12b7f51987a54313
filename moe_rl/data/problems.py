r"""Problems with gold answers from files: GSM8K, MATH, Countdown, the 24 game, and data of your own.

  problems = load_problems('gsm8k/train.jsonl')

reads every record and checks every gold answer before it returns, so that a bad line costs a second at the
start and not a run in the middle. `python -m moe_rl.data.problems FILE` prints what a file holds and each bad
line.

Formats; 'auto' tells them apart by the fields of the first record and by the file name:

  gsm8k      `question`, `answer`; the gold answer follows the last '####' of `answer`.
  math       `problem`, `answer`; without an answer, the last \boxed{...} of `solution`.
  countdown  `{"input": "30,100,93", "output": "23"}`, or the 24 game's CSV with its column `Puzzles`.
  jsonl      `question`, `prompt` or `problem`; `answer` or `reference`; if wanted `kind`, the accuracy
             function (otherwise 'integer' for an answer of digits alone and 'math' for any other).

Where several names will do, the first in the order above that is there counts. JSON is one object a line, or
one array of objects.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import re
import sys

from moe_rl.data.problem_files import (
  SHOWN,
  BadRecord,
  DataError,
  clip,
  field_names,
  nearest,
  no_object,
  read_records,
  text_field,
)

FORMATS = ('gsm8k', 'math', 'countdown', 'jsonl')
_QUESTIONS = ('question', 'prompt', 'problem')
_ANSWERS = ('answer', 'reference')
_CHOICES = ('choices', 'options')
_INTEGER = re.compile(r'[+-]?[0-9]+')
_MAX_MATH_CHARS, _MAX_MATH_DEPTH, _MAX_MATH_BARS = 500, 8, 12
_THOUSANDS = re.compile(r'[+-]?[0-9]{1,3}(,[0-9]{3})+')


@dataclasses.dataclass(frozen=True)
class Problem:
  """One question with its gold answer.

  id: position of the record in its file, from 0, blank lines not counted; randomness is addressed by it.
  question: text for the template, without outer white space.
  reference: gold answer as text, in the form that the accuracy function `kind` reads.
  kind: name of an accuracy function: 'integer', 'math' or 'countdown'.
  """

  id: int
  question: str
  reference: str
  kind: str


@dataclasses.dataclass(frozen=True)
class Fault:
  """One bad record: its line in the file, from 1, and why it is bad with the remedy."""

  line: int
  why: str


@dataclasses.dataclass(frozen=True)
class Scan:
  """All that a file holds, read as `format`: every record is either in `problems` or in `faults`."""

  path: str
  format: str
  problems: tuple[Problem, ...]
  faults: tuple[Fault, ...]


def load_problems(path, fmt='auto') -> list[Problem]:
  """All problems of a file in its order; raises DataError if any record is bad, quoting up to 5 of them."""
  scan = scan_problems(path, fmt)
  if not scan.faults:
    return list(scan.problems)
  total = len(scan.faults) + len(scan.problems)
  lines = [f'{scan.path}: {len(scan.faults)} of {total} records cannot be used (read as {scan.format}):']
  lines += [f'  {scan.path}:{fault.line}: {fault.why}' for fault in scan.faults[:SHOWN]]
  if len(scan.faults) > SHOWN:
    lines.append(f'  and {len(scan.faults) - SHOWN} more')
  lines.append(f'Mend or delete them; `python -m moe_rl.data.problems {scan.path}` lists every one.')
  raise DataError('\n'.join(lines))


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
  if is_csv and fmt not in ('auto', 'countdown'):
    raise DataError(f'{path}: {fmt} is a format of JSON, the file is .csv: name the format auto or countdown')
  records = read_records(path)
  fmt = _guess_format(path, records, is_csv) if fmt == 'auto' else fmt
  parse = _parse_csv_countdown if is_csv else _PARSERS[fmt]
  check = _ReferenceCheck()
  problems, faults = [], []
  for index, record in enumerate(records):
    try:
      if record.why:
        raise BadRecord(record.why)
      question, reference, kind = parse(record.value)
      check(kind, reference)
      problems.append(Problem(index, question, reference, kind))
    except BadRecord as bad:
      faults.append(Fault(record.line, str(bad)))
  return Scan(str(path), fmt, tuple(problems), tuple(faults))


class _ReferenceCheck:
  """Asks the accuracy functions whether they can read a gold answer; one that repeats is asked about once.

  They are imported at the first question: reading a file should not wait for a computer algebra system.
  """

  def __init__(self):
    self._known = {}

  def __call__(self, kind, reference):
    if (kind, reference) not in self._known:
      self._known[kind, reference] = self._ask(kind, reference)
    if self._known[kind, reference]:
      raise BadRecord(self._known[kind, reference])

  def _ask(self, kind, reference):
    from moe_rl.rl.rewards import functions

    if kind not in functions.ACCURACY:
      return (
        f'kind {clip(kind)} is no accuracy function{nearest(kind, functions.ACCURACY)}: '
        f'choose one of {", ".join(sorted(functions.ACCURACY))}'
      )
    if kind == 'math':
      _refuse_labyrinth(reference)
    why = functions.check_reference(kind, reference)
    return why and f'{why}: write the final answer alone, or use format jsonl and name another kind'


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
      raise BadRecord(f'reference {clip(reference)} has {size}: write the final answer alone')


# Telling the formats apart.


def _guess_format(path, records, is_csv):
  first = next((record for record in records if isinstance(record.value, dict)), None)
  if first is None:
    bad = [f'  {path}:{each.line}: {each.why or no_object(each.value)}' for each in records]
    raise DataError('\n'.join([f'{path}: none of its {len(bad)} records is an object:', *bad[:SHOWN]]))
  fields = first.value
  found = ('Puzzles' in fields and 'countdown') if is_csv else _guess_json(fields)
  if found:
    return found
  choices = next((key for key in _CHOICES if key in fields), None)
  look = f'; {choices!r} looks like multiple choice: write the choices into the question' if choices else ''
  raise DataError(
    f'{path}:{first.line}: the format cannot be told: the file name ends in {path.suffix!r} and the first '
    f'record has the fields {field_names(fields)}{look}. Known are gsm8k (question; answer with "#### "), '
    'math (problem; answer or solution), countdown (input; output; or .csv with Puzzles), jsonl (question, '
    'prompt or problem; answer or reference): rename the fields, or name the format.'
  )


def _guess_json(fields):
  if any(key in fields for key in _CHOICES):
    return None  # its `answer` is the number of a choice: taken for the answer it would teach nonsense
  asked = any(key in fields for key in _QUESTIONS)
  answered = any(key in fields for key in _ANSWERS)
  if 'kind' in fields and asked and answered:
    return 'jsonl'
  if 'problem' in fields and ('answer' in fields or 'solution' in fields):
    return 'math'
  if 'input' in fields and 'output' in fields:
    return 'countdown'
  if 'question' in fields and '####' in str(fields.get('answer')):
    return 'gsm8k'
  return 'jsonl' if asked and answered else None


# Formats: one record to (question, reference, kind), or BadRecord.


def _parse_gsm8k(record):
  question, answer = text_field(record, 'question'), text_field(record, 'answer')
  _, marker, gold = answer.rpartition('####')
  if not marker:
    raise BadRecord(f"field 'answer' ({clip(answer)}) has no '####': write the gold answer after '#### '")
  if not gold:
    raise BadRecord("field 'answer' has nothing after its last '####': write the gold answer there")
  return question, _plain(gold.strip()), 'integer'


def _parse_math(record):
  question = text_field(record, 'problem')
  if record.get('answer') is not None or record.get('solution') is None:
    return question, text_field(record, 'answer'), 'math'
  reference = last_boxed(text_field(record, 'solution'))
  if not reference:
    raise BadRecord(
      "field 'answer' is absent and 'solution' has no last \\boxed{...} with text and balanced "
      'braces in it: add one of them'
    )
  return question, reference, 'math'


def last_boxed(text):
  r"""Content of the last \boxed{...}, None if there is none or it has no end; \{ and \} are no braces."""
  start = max((match.end() for match in re.finditer(r'\\boxed\s*\{', text)), default=None)
  depth = 1
  for token in re.finditer(r'\\.|[{}]', text[start:] if start else '', re.DOTALL):
    depth += {'{': 1, '}': -1}.get(token.group(), 0)
    if depth == 0:
      return text[start : start + token.start()].strip()
  return None


def _parse_countdown(record):
  numbers, target = text_field(record, 'input'), text_field(record, 'output')
  return _countdown(_integers(numbers.split(','), 'input'), _integers([target], 'output')[0])


def _parse_csv_countdown(record):
  return _countdown(_integers(text_field(record, 'Puzzles').split(), 'Puzzles'), 24)


def _countdown(numbers, target):
  if len(numbers) < 2:
    raise BadRecord(f'there is only the number {numbers[0]} to make {target} of: give at least 2')
  question = f'Use {",".join(map(str, numbers))} once each with + - * / to make {target}.'
  reference = json.dumps({'numbers': numbers, 'target': target}, separators=(',', ':'))
  return question, reference, 'countdown'


def _integers(texts, key):
  for text in texts:
    if not re.fullmatch(r'\s*[+-]?[0-9]{1,18}\s*', text):
      raise BadRecord(
        f'field {key!r} holds {clip(text)} where an integer is wanted: write numbers as '
        '"30,100,93" (in CSV "1 1 4 6") and one target'
      )
  return [int(text) for text in texts]


def _parse_jsonl(record):
  fields = record if isinstance(record, dict) else {}
  question = text_field(record, _first_present(fields, _QUESTIONS))
  reference = text_field(record, _first_present(fields, _ANSWERS))
  if '####' in reference:
    raise BadRecord("the answer holds '####', as in GSM8K: name the format gsm8k, or write the answer alone")
  if fields.get('kind') is not None:
    kind = text_field(record, 'kind')
  else:
    kind = 'integer' if _INTEGER.fullmatch(reference) else 'math'
  return question, _plain(reference) if kind == 'integer' else reference, kind


def _first_present(fields, keys):
  return next((key for key in keys if fields.get(key) is not None), keys[0])


def _plain(number):
  """'1,080' -> '1080'; any other text is returned as it is."""
  return number.replace(',', '') if _THOUSANDS.fullmatch(number) else number


_PARSERS = {'gsm8k': _parse_gsm8k, 'math': _parse_math, 'countdown': _parse_countdown, 'jsonl': _parse_jsonl}


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
