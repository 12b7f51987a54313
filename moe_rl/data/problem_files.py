"""From a file of problems to its records, each with its line and, where it cannot be read, the reason.

Read are JSON lines, one JSON array of objects, CSV with a header, and Parquet (its line is the row, from 1); text is
UTF-8 with or without a byte order mark, lines ended by LF or CRLF, blank lines anywhere. A fault of the whole file
raises DataError; a fault of one record stays with that record, so that all of them can be told at once.
"""

import codecs
import csv
import dataclasses
import decimal
import difflib
import io
import json
import pathlib
import re

SHOWN = 5  # bad lines or file names quoted in one message
_SPACE = re.compile(r'[ \t\r\n]*')  # white space of JSON


class DataError(ValueError):
  """A data file that cannot be used as it is; the message names file, line, cause and remedy."""


class BadRecord(Exception):
  """Why one record cannot be used, and the remedy."""


ARRAY_RECORD = '.array_record'


class BadReference(BadRecord):
  """A record whose only fault is that its gold answer is absent or cannot be read."""


@dataclasses.dataclass(frozen=True)
class Record:
  """line: where it begins, from 1. value: what JSON or CSV holds there. why: set if it could not be read."""

  line: int
  value: object = None
  why: str | None = None


@dataclasses.dataclass(frozen=True)
class Float:
  """A JSON number as it is written: going through a float could lose digits."""

  literal: str


def read_records(path) -> list[Record]:
  """The records of a file in its order; raises DataError if there is no file or nothing in it."""
  if path.suffix.lower() == '.parquet':
    return _parquet_records(path, _read_bytes(path))
  if path.suffix.lower() == ARRAY_RECORD:
    _read_bytes(path)  # says what is wrong with the path
    return _grain_records(path)
  lines, records = _decode_lines(path, _read_bytes(path))
  if path.suffix.lower() == '.csv':
    records += _csv_records(lines)
  elif '\n'.join(lines).lstrip().startswith('['):
    records += _array_records('\n'.join(lines))
  else:
    records += _line_records(lines)
  if not records:
    raise DataError(f'{path}: the file holds no record: give a file with at least one problem')
  return sorted(records, key=lambda record: record.line)


def parse_records(path, parse) -> list:
  """parse(record) of every record of a file, in its order; parse raises BadRecord for a bad one.

  Raises DataError naming the file, up to five bad lines and the remedy, or as `read_records`.
  """
  out, faults = [], []
  for record in read_records(path):
    try:
      if record.why:
        raise BadRecord(record.why)
      out.append(parse(record))
    except BadRecord as bad:
      faults.append(f'  {path}:{record.line}: {bad}')
  if faults:
    more = [f'  and {len(faults) - SHOWN} more'] if len(faults) > SHOWN else []
    raise DataError('\n'.join([f'{path}: {len(faults)} of {len(faults) + len(out)} records cannot be used:',
                               *faults[:SHOWN], *more, 'Mend or delete them.']))
  return out


def _read_bytes(path):
  try:
    raw = path.read_bytes()
  except FileNotFoundError:
    if path.parent.is_dir():
      hint = nearest(path.name, (sibling.name for sibling in path.parent.iterdir()))
    else:
      hint = f' (nor a directory {path.parent})'
    cwd = pathlib.Path.cwd()
    raise DataError(f'{path}: there is no such file{hint}: check the path, seen from {cwd}') from None
  except IsADirectoryError:
    endings = ('.jsonl', '.json', '.csv', '.parquet', ARRAY_RECORD)
    files = sorted(child.name for child in path.iterdir() if child.suffix.lower() in endings)
    held = ', '.join(files[:SHOWN]) or f'no .jsonl, .json, .csv, .parquet or {ARRAY_RECORD} file'
    raise DataError(f'{path}: is a directory: name one file in it (it holds {held})') from None
  except OSError as error:
    raise DataError(f'{path}: cannot be read ({error.strerror}): check its permissions') from None
  if not raw:
    raise DataError(f'{path}: the file is empty (0 bytes): was it written or downloaded to the end?')
  if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    raise DataError(f'{path}: the text is UTF-16: save it as UTF-8')
  return raw


def _decode_lines(path, raw):
  """(lines of text, records of the lines that are no UTF-8); the latter are blank lines among the former."""
  lines, unreadable = [], []
  # Split at '\n' alone: str.splitlines would also cut at U+2028, which JSON allows inside a string.
  for number, line in enumerate(raw.split(b'\n'), 1):
    try:
      lines.append(line.removesuffix(b'\r').decode().removeprefix('\ufeff'))
    except UnicodeDecodeError as error:
      lines.append('')
      byte = f'0x{line[error.start]:02x} at byte {error.start + 1}'
      why = f'is not UTF-8 ({byte}): save {path.name} as UTF-8'
      unreadable.append(Record(number, why=why))
  return lines, unreadable


# NaN and the infinities are no JSON, but common in exports, mostly in fields that nobody reads.
_DECODER = json.JSONDecoder(parse_float=Float, parse_constant=Float)


def _json_why(error, remedy):
  if isinstance(error, json.JSONDecodeError):
    return f'is not valid JSON ({error.msg}, column {error.colno}): {remedy}'
  # An integer of over 4,300 digits, or nesting of over 1,000.
  return f'cannot be read as JSON ({error}): shorten it'


def _line_records(lines):
  records = [_line_record(number, line) for number, line in enumerate(lines, 1) if line.strip()]
  if len(records) > 1 and records[0].why:
    # One object written over many lines is one mistake, not one for each line.
    whole = _line_record(records[0].line, '\n'.join(lines))
    if isinstance(whole.value, dict):
      why = (
        f'the file is a single JSON object with the fields {field_names(whole.value)}: '
        'write one object on each line, or one array of objects'
      )
      return [Record(whole.line, why=why)]
  return records


def _line_record(number, line):
  try:
    return Record(number, _DECODER.decode(line))
  except (ValueError, RecursionError) as error:
    return Record(number, why=_json_why(error, 'write one whole JSON object on this line'))


def _array_records(text):
  """Records of one JSON array, read one by one so that each knows the line on which it begins."""
  records, line, counted = [], 1, 0
  position = _SPACE.match(text, text.index('[') + 1).end()
  closed = text[position : position + 1] == ']'
  while not closed:
    line, counted = line + text.count('\n', counted, position), position
    try:
      value, position = _DECODER.raw_decode(text, position)
      records.append(Record(line, value))
      position = _SPACE.match(text, position).end()
      if text[position : position + 1] not in (',', ']'):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    except (ValueError, RecursionError) as error:
      why = _json_why(error, 'correct it; nothing after it in the array was read')
      return [*records, Record(getattr(error, 'lineno', line), why=why)]
    closed = text[position] == ']'
    position = position if closed else _SPACE.match(text, position + 1).end()
  rest = _SPACE.match(text, position + 1).end()
  if rest < len(text):
    why = 'stands after the end of the array: delete it, or write one object on each line, without [ and ]'
    records.append(Record(text.count('\n', 0, rest) + 1, why=why))
  return records


def _parquet_records(path, raw):
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise DataError(f"{path}: reading Parquet takes pyarrow: pip install 'moe_rl[parquet]', or save it as JSON lines"
                    ) from error
  try:
    rows = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
  except pyarrow.ArrowException as error:
    why = str(error).splitlines()[0]
    raise DataError(f'{path}: is no Parquet file ({why}): was it downloaded to the end?') from error
  if not rows:
    raise DataError(f'{path}: the file holds no record: give a file with at least one problem')
  return [Record(number, _as_json(row)) for number, row in enumerate(rows, 1)]


def array_record_module():
  """Its reader and writer. Raises DataError where it is not installed (Grain brings it on Linux)."""
  try:
    from array_record.python import array_record_module
  except ImportError as error:
    raise DataError(f'{ARRAY_RECORD} files take array_record: pip install array_record, or use JSON lines') from error
  return array_record_module


def _grain_records(path):
  """Each record is one JSON object."""
  module = array_record_module()
  try:
    reader = module.ArrayRecordReader(str(path))
    lines = reader.read_all() if reader.num_records() else []
  except (RuntimeError, ValueError, IndexError) as error:
    raise DataError(f'{path}: is no ArrayRecord file ({error}): was it written to the end?') from error
  if not lines:
    raise DataError(f'{path}: the file holds no record: give a file with at least one problem')
  return [_line_record(number, line.decode('utf-8', 'replace')) for number, line in enumerate(lines, 1)]


def _as_json(value):
  """The value as the JSON reader would give it: floats by their digits."""
  if isinstance(value, dict):
    return {name: _as_json(part) for name, part in value.items()}
  if isinstance(value, list):
    return [_as_json(part) for part in value]
  return Float(repr(value)) if isinstance(value, float) else value


def _csv_records(lines):
  rows = csv.reader(lines)
  records, header = [], None
  try:
    for row in rows:
      if header is None and any(cell.strip() for cell in row):
        header = [cell.strip() for cell in row]
      elif any(cell.strip() for cell in row):
        # A short row lacks its last fields, and is told so by the one who asks for them.
        records.append(Record(rows.line_num, dict(zip(header, row, strict=False))))
  except csv.Error as error:
    why = f'is not valid CSV ({error}): correct it; nothing after it was read'
    records.append(Record(rows.line_num, why=why))
  return records


# Fields of a record.


def text_field(record, key):
  """Field `key` as text without outer white space; numbers become text without losing a digit, 27.0 -> '27'.

  Raises BadRecord if the record is no object or the field is missing, empty, or neither text nor a number.
  """
  if not isinstance(record, dict):
    raise BadRecord(no_object(record))
  if key not in record:
    raise BadRecord(
      f'field {key!r} is missing (the record has {field_names(record)}): add it, or rename the field that holds it'
    )
  value = record[key]
  if isinstance(value, Float):
    value = _decimal_text(value.literal, key)
  elif isinstance(value, int) and not isinstance(value, bool):
    value = str(value)
  if value is None:
    raise BadRecord(f'field {key!r} is null: fill it in, or delete the record')
  if not isinstance(value, str):
    raise BadRecord(f'field {key!r} is {_json_type(value)}, not text: write it as a string')
  if not value.strip():
    raise BadRecord(f'field {key!r} is empty: fill it in, or delete the record')
  try:
    value.encode()
  except UnicodeEncodeError as error:  # a lone \ud800 passes JSON, and would stop the tokenizer later
    half = f'\\u{ord(value[error.start]):04x}'
    raise BadRecord(f'field {key!r} holds {half}, half a character: delete it, or write both') from None
  return value.strip()


def _decimal_text(literal, key):
  try:
    number = decimal.Decimal(literal)
  except decimal.InvalidOperation:  # an exponent beyond 10**18
    number = decimal.Decimal('NaN')
  if not number.is_finite() or abs(number.adjusted()) > 300:
    raise BadRecord(f'field {key!r} is {clip(literal)}, no number of a size to write out: write a string')
  text = format(number, 'f')
  text = text.rstrip('0').rstrip('.') if '.' in text else text
  return '0' if text == '-0' else text


# Words for messages.


def no_object(value, *fields):
  """Why a JSON value that is no object is no record with these fields."""
  shown = ', '.join(f'"{field}": ...' for field in fields or ('question', 'answer'))
  return f'is {_json_type(value)}, not a JSON object: write {{{shown}}}'


def _json_type(value):
  names = {
    type(None): 'null',
    bool: 'a boolean',
    int: 'a number',
    Float: 'a number',
    str: 'a string',
    list: 'an array',
  }
  return names.get(type(value), 'an object')


def field_names(record):
  """The fields of a record for a message."""
  return ', '.join(map(clip, record)) or 'no field'


def clip(text, width=40):
  """Quoted text of a length fit for a message."""
  return repr(text if len(text) <= width else text[:width] + '…')


def nearest(word, words):
  """' (nearest: ...)' where one of the words is much like this one, else ''."""
  close = difflib.get_close_matches(str(word), list(words), 1)
  return f' (nearest: {close[0]!r})' if close else ''
