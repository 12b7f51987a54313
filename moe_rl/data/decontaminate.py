"""Which training questions are evaluation questions, by runs of words that both have.

`python -m moe_rl.data.decontaminate TRAIN.jsonl --against EVAL.jsonl [EVAL2.jsonl …] [--n=10] [--out=KEPT.jsonl]`

Two questions overlap if they have n words in a row in common (10: DeepSeek-R1, arXiv:2501.12948, supplement). One of
fewer words overlaps with its equals only. Words are runs of letters and digits, in any case, Unicode forms folded;
single Chinese or Japanese characters; and signs of arithmetic, which tell 2+3 from 2-3. Other punctuation and white
space are nothing. Only questions are compared, not answers.

The status is 0 if nothing overlaps or the rest was written to --out (as it stands in TRAIN, line for line), 1 if
something overlaps, 2 on bad input.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator

from moe_rl.data.problem_files import BadRecord, DataError, Record, read_records, text_field

WORDS = 10  # in a row
QUESTIONS = ('question', 'problem', 'prompt', 'text')
_SHOWN = 20  # overlaps that are printed or noted
_CJK = '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff'
# A hyphen between letters is punctuation, a minus beside a digit or a bracket is not.
_WORD = re.compile(rf'[{_CJK}]|(?:(?![{_CJK}_])\w)+|[+=<>×÷±]|(?<=[\d)\]}}])\s*[-*/^]|[-*/^](?=\s*[\d(\[{{])')


def words(text: str) -> tuple[str, ...]:
  """The text's words as they are compared."""
  folded = unicodedata.normalize('NFKC', text).casefold().replace('\u2212', '-')
  return tuple(match.strip() for match in _WORD.findall(folded))


@dataclasses.dataclass(frozen=True)
class Place:
  """A question: its file and its line there, from 1."""

  file: str
  line: int

  def __str__(self) -> str:
    return f'{self.file}:{self.line}'


class Overlaps:
  """Evaluation questions by the runs of words in them."""

  def __init__(self, n: int = WORDS):
    """Raises ValueError for n < 1."""
    if n < 1:
      raise ValueError(f'--n={n}: give 1 or more words')
    self.n = n
    self._places: dict[tuple[str, ...], list[Place]] = collections.defaultdict(list)

  def add(self, question: str, place: Place):
    for run in self._runs(question):
      self._places[run].append(place)

  def of(self, question: str) -> tuple[Place, ...]:
    """The evaluation questions that this one overlaps with, in the order of its words."""
    return tuple(dict.fromkeys(place for run in self._runs(question) for place in self._places.get(run, ())))

  def _runs(self, question: str) -> Iterable[tuple[str, ...]]:
    """Runs of n words, each once; all of a shorter question, which as a run of its own length has equals only."""
    said = words(question)
    if len(said) < self.n:
      return {said} if said else ()
    return dict.fromkeys(said[i:i + self.n] for i in range(len(said) - self.n + 1))


def overlaps_with(paths: Iterable[str | os.PathLike], n: int = WORDS) -> Overlaps:
  """Reads evaluation files. Raises DataError for one that cannot be read, or a record without a question."""
  found = Overlaps(n)
  for path in map(_path, paths):
    for record, question in questions(path):
      found.add(question, Place(str(path), record.line))
  return found


def questions(path: pathlib.Path) -> Iterator[tuple[Record, str]]:
  """Each record of a file with its question: the first of `QUESTIONS` that it has. Raises DataError."""
  for record in read_records(path):
    try:
      yield record, _question(record)
    except (BadRecord, DataError) as bad:
      raise DataError(f'{path}:{record.line}: {bad}') from None


def files(given: str) -> list[str]:
  """config.task.decontaminate as file names."""
  return [name.strip() for name in given.split(',') if name.strip()]


def notes(removed: list[tuple[str, tuple[Place, ...]]], n: int = WORDS) -> list[str]:
  """Lines for the log: how many were left out, and each with the evaluation question that it overlaps with."""
  if not removed:
    return []
  shown = [f'  {what} with {", ".join(map(str, places[:3]))}' for what, places in removed[:_SHOWN]]
  more = [f'  and {len(removed) - _SHOWN} more'] if len(removed) > _SHOWN else []
  return [f'left out {len(removed)} training problems that have {n} words in a row (or all) in common with an '
          'evaluation question:', *shown, *more]


def _path(path: str | os.PathLike) -> pathlib.Path:
  return pathlib.Path(os.path.expanduser(path))


def _question(record: Record) -> str:
  if record.why:
    raise DataError(record.why)
  fields = record.value if isinstance(record.value, dict) else {}
  key = next((key for key in QUESTIONS if fields.get(key) is not None), QUESTIONS[0])
  return text_field(record.value, key)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog='python -m moe_rl.data.decontaminate', description=__doc__.splitlines()[0])
  parser.add_argument('train', help='JSON lines (or, without --out, any problem file)')
  parser.add_argument('--against', nargs='+', required=True, metavar='EVAL', help='evaluation files')
  parser.add_argument('--n', type=int, default=WORDS, help='words in a row; default: %(default)s')
  parser.add_argument('--out', help='where to write the lines of TRAIN that overlap with nothing')
  args = parser.parse_args(argv)
  try:
    print(run(args.train, args.against, args.n, args.out, found := []))
  except ValueError as error:  # DataError among them
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 1 if found and not args.out else 0


def run(train: str, against: list[str], n: int, out: str | None, found: list) -> str:
  """Compares, writes `out` if given, and fills `found` with (line, places); a report. Raises ValueError."""
  evaluation, path = overlaps_with(against, n), _path(train)
  total = 0
  for record, question in questions(path):
    total += 1
    if places := evaluation.of(question):
      found.append((record.line, places))
  if out:
    _write_kept(path, _path(out), {line for line, _ in found}, total)
  lines = [f'{path}:{line}: {", ".join(map(str, places[:3]))}' + (f' and {len(places) - 3} more' if places[3:] else '')
           for line, places in found]
  kept = f'; {total - len(found)} lines written to {out}' if out else ''
  return '\n'.join([*lines, f'{len(found)} of {total} questions of {path} have {n} words in a row (or all) in common '
                    f'with one of {", ".join(map(str, against))}{kept}'])


def _write_kept(path: pathlib.Path, out: pathlib.Path, dropped: set[int], total: int):
  """The lines but the dropped ones, byte for byte; whole or not there."""
  lines = path.read_bytes().split(b'\n')
  if total != sum(1 for line in lines if line.strip()):
    raise ValueError(f'--out: {path} is not one record a line, so its lines cannot be kept apart: write it as JSON '
                     'lines first')
  partial = out.with_name(out.name + '.partial')
  try:
    partial.write_bytes(b'\n'.join(line for number, line in enumerate(lines, 1) if number not in dropped))
    os.replace(partial, out)
  except OSError as error:
    raise ValueError(f'--out {out}: cannot be written ({error.strerror}): choose another file') from error


if __name__ == '__main__':
  sys.exit(main())
