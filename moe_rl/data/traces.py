"""Traces: questions with whole responses, from JSON lines, and the examples that supervised fine-tuning makes of them.

A line is an object with `question` and `response`, such as `<think>1+2=3</think><answer>3</answer>`. Whatever else it
holds (id, reference, kind, accuracy, source, …) is kept and not read.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from moe_rl.data.problem_files import SHOWN, BadRecord, DataError, read_records, text_field
from moe_rl.data.templates import TAGS, opening, prompt_ids
from moe_rl.data.tokenizer import Tokenizer

THINK, THINK_END = TAGS[:2]


@dataclasses.dataclass(frozen=True)
class Trace:
  """question, response: without outer white space; where: 'FILE:LINE', for people; others: the record's other fields,
  as `problem_files` reads them."""

  question: str
  response: str
  where: str = ''
  others: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Source:
  """A file of traces, and how many of its first ones are meant; None: all."""

  path: pathlib.Path
  first: int | None = None


def parse_sources(paths: str | Iterable[str]) -> list[Source]:
  """'a.jsonl,b.jsonl@100', or a list of such parts: all of a.jsonl, then the first 100 traces of b.jsonl.

  Raises ValueError for an empty part or a count of none.
  """
  out = []
  for part in paths.split(',') if isinstance(paths, str) else paths:
    name, first = part.strip(), None
    if counted := re.fullmatch(r'(.+)@(\d+)', name):
      name, first = counted[1], int(counted[2])
    if not name or first == 0:
      raise ValueError(f"config.sft.path '{paths}': '{part}' names no trace: write FILE, or FILE@N with N from "
                       '1, with single commas between')
    out.append(Source(pathlib.Path(name).expanduser(), first))
  return out


def read_traces(paths: str | Iterable[str]) -> list[Trace]:
  """The traces of one or several files, as `parse_sources` takes them, in their order.

  Raises DataError for a file that cannot be read, or quoting up to 5 lines that are no traces, each with the reason;
  lines after the first N of FILE@N are not looked at.
  """
  return [trace for source in parse_sources(paths) for trace in _of_file(source)]


def _of_file(source: Source) -> list[Trace]:
  records, traces, faults = read_records(source.path)[:source.first], [], []
  for record in records:
    where = f'{source.path}:{record.line}'
    try:
      if record.why:
        raise BadRecord(record.why)
      traces.append(_trace(record.value, where))
    except BadRecord as bad:
      faults.append(f'{where}: {bad}')
  _refuse(faults, len(records), f'{source.path}')
  return traces


def _trace(record, where: str) -> Trace:
  if not isinstance(record, dict):
    raise BadRecord('is no JSON object: write {"question": ..., "response": ...}')
  others = {key: value for key, value in record.items() if key not in ('question', 'response')}
  return Trace(text_field(record, 'question'), text_field(record, 'response'), where, others)


def _refuse(faults: list[str], total: int, what: str):
  """Raises DataError with the first faults, if there are any."""
  if faults:
    more = [f'  and {len(faults) - SHOWN} more'] if faults[SHOWN:] else []
    raise DataError('\n'.join([f'{what}: {len(faults)} of {total} traces cannot be used:',
                               *(f'  {fault}' for fault in faults[:SHOWN]), *more, 'Mend or delete them.']))


@dataclasses.dataclass(frozen=True)
class Example:
  """ids: int32 [n], prompt, response, end; prompt: how many of them are the prompt's, at least 1; where: its line."""

  ids: np.ndarray
  prompt: int
  where: str


def example(template: str, tokenizer: Tokenizer, trace: Trace, opened: str) -> Example:
  """The template's prompt, the response with its tags as tokens where the vocabulary has them, eos.

  opened: what the prompt already says of the answer (`templates.opening`): of the response that part is not said again.
  Raises BadRecord where the response cannot go on from it.
  """
  prompt = prompt_ids(template, tokenizer, trace.question)
  response = continuation(trace.response, opened)
  ids = [*prompt, *tokenizer.encode(response, allow=TAGS), tokenizer.eos_id]
  return Example(np.array(ids, np.int32), len(prompt), trace.where)


def continuation(response: str, opened: str) -> str:
  """What of a whole response comes after the prompt's own opening, '' or '<think>' with white space.

  A response that begins within the thought, and ends it, is taken to go on from there. Raises BadRecord for any other.
  """
  if not opened:
    return response
  if response.startswith(THINK):
    return response.removeprefix(opened) if response.startswith(opened) else response.removeprefix(THINK)
  if THINK_END in response:
    return response
  raise BadRecord(f"its response has no thought, and the prompt opens one ('{THINK}'): begin it with "
                  f"'{THINK}{THINK_END}', or use a config.template that opens none")


@dataclasses.dataclass(frozen=True)
class Examples:
  """kept: in the files' order; longest: tokens of the longest kept one; left_out: too-long ones; notes: lines for the
  log."""

  kept: list[Example]
  longest: int
  left_out: int
  notes: list[str]

  @property
  def tokens(self) -> int:
    return sum(len(e.ids) for e in self.kept)

  @property
  def response_tokens(self) -> int:
    """eos included."""
    return sum(len(e.ids) - e.prompt for e in self.kept)


def load_examples(config, tokenizer: Tokenizer) -> Examples:
  """The examples of config.sft.path in config.template.

  One longer than sft.row_tokens, or than the model's length, is left out, counted and named. Raises ValueError if none
  is left or the tokenizer lacks what the template needs, DataError for files that cannot be used.
  """
  limit = min(config.sft.row_tokens or config.model.max_length, config.model.max_length)
  opened, examples, faults, notes = opening(config.template, tokenizer), [], [], []
  for source in parse_sources(config.sft.path):
    traces = _of_file(source)
    if source.first and len(traces) < source.first:
      notes.append(f'{source.path} has {len(traces)} traces, not the {source.first} that config.sft.path asks for')
    for trace in traces:
      try:
        examples.append(example(config.template, tokenizer, trace, opened))
      except BadRecord as bad:
        faults.append(f'{trace.where}: {bad}')
  _refuse(faults, len(examples) + len(faults), config.sft.path)
  kept = [e for e in examples if len(e.ids) <= limit]
  long = [e for e in examples if len(e.ids) > limit]
  key = 'sft.row_tokens' if config.sft.row_tokens == limit else 'model.max_length'
  if not kept:
    shortest = min(len(e.ids) for e in long)
    raise ValueError(f'{config.sft.path}: every example is longer than config.{key} {limit} (the shortest has '
                     f'{shortest} tokens): raise it')
  notes.append(f'{len(kept):,} examples of {config.sft.path}')
  if long:
    worst = max(long, key=lambda e: len(e.ids))
    notes.append(f'left out {len(long)} examples longer than config.{key} {limit}; the longest is {worst.where} with '
                 f'{len(worst.ids)} tokens')
  return Examples(kept, max(len(e.ids) for e in kept), len(long), notes)
