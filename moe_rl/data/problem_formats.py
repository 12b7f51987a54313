r"""From one record of a problem file to (question, reference, kind) or (question, reference, kind, level), by format.

  gsm8k      `question`, `answer`; the gold answer, a number, follows the last '####' of `answer`.
  math       `problem`, `answer`; without an answer, the last \boxed{...} of `solution`; if there, the problem's `level`
             or `difficulty` ('Level 5', 5 or 5.0). OlympiadBench's `question` and `final_answer` will do.
  countdown  `{"input": "30,100,93", "output": "23"}`, or the 24 game's CSV with its column `Puzzles`.
  choice     `question`, `choices` or `options`, `answer` or `correct`: a letter, or a number from 0 (MMLU, AQuA).
  mbpp       `text` or `prompt`, `test_list` of asserts; if there, `test_setup_code`, `test_imports`.
  jsonl      `question`, `prompt` or `problem`; `answer` or `reference`; if wanted `kind`, the accuracy function
             (otherwise 'math'), and `level`.

Where several names will do, the first in the order above that is there counts.
"""

import json
import re
import string

from moe_rl.data.problem_files import (
  SHOWN,
  BadRecord,
  BadReference,
  DataError,
  clip,
  field_names,
  no_object,
  text_field,
)
from moe_rl.rl.rewards import extract

_QUESTIONS = ('question', 'prompt', 'problem')
_ANSWERS = ('answer', 'reference')
_CHOICES = ('choices', 'options')
_NUMBER = re.compile(r'[+-]?[0-9]+(\.[0-9]+)?')
_THOUSANDS = re.compile(r'[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?')
_LABEL = re.compile(r'^\(?[A-Z][).:]\s*')
_LEVELS = ('level', 'difficulty')

# Telling the formats apart.


def guess_format(path, records, is_csv):
  """The format that the fields of the first record tell. Raises DataError where they tell none."""
  first = next((record for record in records if isinstance(record.value, dict)), None)
  if first is None:
    bad = [f'  {path}:{each.line}: {each.why or no_object(each.value)}' for each in records]
    raise DataError('\n'.join([f'{path}: none of its {len(bad)} records is an object:', *bad[:SHOWN]]))
  fields = first.value
  found = 'countdown' if is_csv and 'Puzzles' in fields else _guess_json(fields)
  if found:
    return found
  raise DataError(
    f'{path}:{first.line}: the format cannot be told: the file name ends in {path.suffix!r} and the first '
    f'record has the fields {field_names(fields)}. Known are gsm8k (question; answer with "#### "), math (problem; '
    'answer or solution), countdown (input; output; or .csv with Puzzles), choice (question; choices or options; '
    'answer or correct), mbpp (text or prompt; test_list), jsonl (question, prompt or problem; answer or reference): '
    'rename the fields, or name the format.'
  )


def _guess_json(fields):
  if any(key in fields for key in _CHOICES):
    return 'choice'  # before all others: its `answer` is the number of a choice
  if 'test_list' in fields:
    return 'mbpp'
  asked = any(key in fields for key in _QUESTIONS)
  answered = any(key in fields for key in _ANSWERS)
  if 'kind' in fields and asked and answered:
    return 'jsonl'
  if 'problem' in fields and ('answer' in fields or 'solution' in fields) or asked and 'final_answer' in fields:
    return 'math'
  if 'input' in fields and 'output' in fields:
    return 'countdown'
  if 'question' in fields and '####' in str(fields.get('answer')):
    return 'gsm8k'
  return 'jsonl' if asked and answered else None


# Formats: one record to (question, reference, kind) with a level if it has one, or BadRecord.


def _parse_gsm8k(record):
  question, answer = text_field(record, 'question'), text_field(record, 'answer')
  _, marker, gold = answer.rpartition('####')
  if not marker:
    raise BadRecord(f"field 'answer' ({clip(answer)}) has no '####': write the gold answer after '#### '")
  gold = _plain(gold.strip())
  if not gold:
    raise BadReference("field 'answer' has nothing after its last '####': write the gold answer there")
  if not _NUMBER.fullmatch(gold):
    raise BadReference(f'reference {clip(gold)} is not one number such as 18 or -1,450: GSM8K has no others')
  return question, gold, 'math'


def _parse_math(record):
  olympiad = isinstance(record, dict) and record.get('final_answer')
  question = text_field(record, _first_present(record, ('problem', 'question')) if olympiad else 'problem')
  if olympiad:
    return question, ', '.join(_texts(record, 'final_answer')), 'math', _level(record)
  if record.get('answer') is not None or record.get('solution') is None:
    return question, _gold(record, 'answer'), 'math', _level(record)
  reference = extract.last_boxed(text_field(record, 'solution'))
  if not reference:
    raise BadReference(
      "field 'answer' is absent and 'solution' has no last \\boxed{...} with text and balanced "
      'braces in it: add one of them'
    )
  return question, reference, 'math', _level(record)


def _parse_countdown(record):
  numbers, target = text_field(record, 'input'), text_field(record, 'output')
  return _countdown(_integers(numbers.split(','), 'input'), _integers([target], 'output')[0])


def parse_csv_countdown(record):
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
  reference = _gold(record, _first_present(fields, _ANSWERS))
  if '####' in reference:
    raise BadRecord("the answer holds '####', as in GSM8K: name the format gsm8k, or write the answer alone")
  kind = text_field(record, 'kind') if fields.get('kind') is not None else 'math'
  return question, _plain(reference) if kind in ('integer', 'math') else reference, kind, _level(record)


def _level(record):
  """'Level 5', 5 and 5.0 -> '5'; '' where there is none: nobody's training depends on it."""
  key = _first_present(record, _LEVELS)
  try:
    return re.sub(r'(?i)^level\s*', '', text_field(record, key))
  except BadRecord:
    return ''


def _first_present(fields, keys):
  return next((key for key in keys if fields.get(key) is not None), keys[0])


def _plain(number):
  """'1,080' -> '1080'; any other text is returned as it is."""
  return number.replace(',', '') if _THOUSANDS.fullmatch(number) else number


def _gold(record, key):
  """A gold answer's text; one that is absent, null or empty is a fault of the reference, not of the record."""
  value = record.get(key) if isinstance(record, dict) else record
  if isinstance(record, dict) and (value is None or not str(value).strip()):
    try:
      return text_field(record, key)
    except BadRecord as bad:
      raise BadReference(str(bad)) from None
  return text_field(record, key)


def _texts(record, key):
  """Field `key` as a list of texts; a list written as JSON text is read too."""
  value = record.get(key)
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError):
      value = [value] if value.strip() else []
  if not isinstance(value, list) or not value:
    raise BadRecord(f'field {key!r} is no list with something in it: write ["...", "..."]')
  return [text_field({key: part}, key) for part in value]


def _parse_choice(record):
  if not isinstance(record, dict):
    raise BadRecord(no_object(record))
  question, key = text_field(record, 'question'), _first_present(record, _CHOICES)
  texts = [_LABEL.sub('', text) for text in _texts(record, key)]
  letters = string.ascii_uppercase[:len(texts)]
  if not 2 <= len(texts) <= len(string.ascii_uppercase):
    raise BadRecord(f'field {key!r} holds {len(texts)} choices: give 2 to {len(string.ascii_uppercase)}')
  gold = _gold(record, _first_present(record, ('correct', 'answer')))
  if gold.isascii() and gold.isdigit() and gold not in texts:
    gold = letters[int(gold)] if len(gold) < 3 and int(gold) < len(texts) else gold
  elif gold in texts:
    gold = letters[texts.index(gold)]
  if len(gold) != 1 or gold not in letters:
    raise BadReference(f'the answer {clip(gold)} is none of the {len(texts)} choices: give its letter, or its number '
                       'from 0')
  listed = '\n'.join(f'{letter}) {text}' for letter, text in zip(letters, texts, strict=True))
  reference = json.dumps({'answer': gold, 'choices': texts}, ensure_ascii=False)
  return f'{question}\n{listed}', reference, 'choice'


def _parse_mbpp(record):
  if not isinstance(record, dict):
    raise BadRecord(no_object(record))
  question, tests = text_field(record, _first_present(record, ('text', 'prompt'))), _texts(record, 'test_list')
  setup = record.get('test_setup_code') or ''
  if record.get('test_imports'):
    setup = '\n'.join([*_texts(record, 'test_imports'), setup])
  listed = '\n'.join(tests)
  reference = json.dumps({'tests': tests, 'setup': setup}, ensure_ascii=False)
  return f'{question} Your code should pass these tests:\n{listed}', reference, 'code'


PARSERS = {'gsm8k': _parse_gsm8k, 'math': _parse_math, 'countdown': _parse_countdown, 'choice': _parse_choice,
           'mbpp': _parse_mbpp, 'jsonl': _parse_jsonl}
FORMATS = tuple(PARSERS)
