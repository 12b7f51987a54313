"""What people prefer, from files: pairs of answers of which one is better, or answers that are safe or not.

A reward model for helpfulness reads the final summary alone, so that it does not sway how a model thinks; one for
safety reads the whole response (DeepSeek-R1, arXiv:2501.12948v2, supplement). Pairs are balanced by length: where the
better answers are the longer ones on the whole, length is what a model would learn.
"""

import dataclasses
import os
import pathlib

import numpy as np

from moe_rl.data.problem_files import BadRecord, no_object, parse_records, text_field
from moe_rl.data.templates import TAGS, opening, prompt_ids
from moe_rl.data.tokenizer import Tokenizer
from moe_rl.rl.rewards import extract

KINDS = ('helpfulness', 'safety')


@dataclasses.dataclass(frozen=True)
class Judgement:
  """A line of a file. responses: (the better, the worse) for helpfulness, one for safety; good: False for one response
  that is unsafe."""

  line: int
  question: str
  responses: tuple[str, ...]
  good: bool = True


@dataclasses.dataclass(frozen=True)
class Example:
  """sequences: token ids of a prompt and what is judged of a response, eos last: the better one first; good: False
  where the only one is bad."""

  sequences: tuple[tuple[int, ...], ...]
  good: bool = True

  @property
  def tokens(self) -> int:
    return sum(map(len, self.sequences))

  @property
  def longer(self) -> int:
    """Tokens that the better answer has more than the worse one."""
    return len(self.sequences[0]) - len(self.sequences[1]) if self.sequences[1:] else 0


@dataclasses.dataclass(frozen=True)
class Examples:
  """train, held_out: what is learnt from and what is not; left_out: too long ones and those that would teach length;
  notes: lines for the log."""

  train: list[Example]
  held_out: list[Example]
  left_out: int
  notes: list[str]

  @property
  def longest(self) -> int:
    """Tokens of the longest example, both answers of a pair together."""
    return max(example.tokens for example in self.train + self.held_out)


def read_judgements(path: str | os.PathLike, kind: str) -> list[Judgement]:
  """JSON lines (or an array, or CSV) with `question`, `chosen`, `rejected` for helpfulness; `question`, `response` and
  `safe` (true or false) for safety. Other fields are not read.

  Raises DataError naming the file, up to five lines and the remedy, if a line is bad.
  """
  return parse_records(pathlib.Path(os.path.expanduser(path)), lambda record: _judgement(record, kind))


def _judgement(record, kind: str) -> Judgement:
  fields = record.value
  if not isinstance(fields, dict):
    raise BadRecord(no_object(fields))
  question = text_field(fields, 'question')
  if kind == 'helpfulness':
    chosen, rejected = (text_field(fields, key) for key in ('chosen', 'rejected'))
    if chosen == rejected:
      raise BadRecord("fields 'chosen' and 'rejected' are the same text: delete the record")
    return Judgement(record.line, question, (chosen, rejected))
  if not isinstance(fields.get('safe'), bool):
    raise BadRecord("field 'safe' must be true or false: add it, or write it so")
  return Judgement(record.line, question, (text_field(fields, 'response'),), fields['safe'])


def judged(kind: str, response: str) -> str:
  """What a reward model reads of a response: the final summary for helpfulness ('' if there is none), all for safety.
  """
  return extract.summary(response) if kind == 'helpfulness' else response


class Encoder:
  """(question, response) -> token ids that end with eos, as a reward model of a kind reads them.

  Raises ValueError for a template that opens a thought, where the thought is not read.
  """

  def __init__(self, kind: str, template: str, tokenizer: Tokenizer):
    self.kind, self.template, self.tokenizer = kind, template, tokenizer
    self.opening = opening(template, tokenizer)
    if self.opening and kind == 'helpfulness':
      raise ValueError(f"config.template '{template}' opens a thought, and a reward model for helpfulness reads the "
                       "summary alone: use a template that does not, such as 'r1'")

  def __call__(self, question: str, response: str) -> tuple[int, ...]:
    text = judged(self.kind, response).removeprefix(self.opening)
    return (*prompt_ids(self.template, self.tokenizer, question), *self.tokenizer.encode(text, allow=TAGS),
            self.tokenizer.eos_id)


def load_examples(config, tokenizer: Tokenizer) -> Examples:
  """Examples of config.reward_model. Raises DataError for a bad file, ValueError where nothing is left to train on."""
  c = config.reward_model
  encode, paths = Encoder(c.kind, config.template, tokenizer), [c.path, *filter(None, [c.eval_path])]
  files = [read_judgements(path, c.kind) for path in paths]
  if c.eval_path:
    train, held_out = files[0], files[1][:c.held_out]
  else:
    train, held_out = files[0][:-c.held_out], files[0][-c.held_out:]
    if not train:
      raise ValueError(f'{c.path} has {len(files[0])} records, not more than config.reward_model.held_out '
                       f'{c.held_out}: lower it, or give config.reward_model.eval_path')

  def fits(example: Example) -> bool:
    return example.tokens <= (c.row_tokens or example.tokens) and (
      max(map(len, example.sequences)) <= config.model.max_length)
  kept, notes, left_out = [], [], 0
  for name, path, judgements in (('training', c.path, train), ('held-out', paths[-1], held_out)):
    made = [Example(tuple(encode(j.question, r) for r in j.responses), j.good) for j in judgements]
    long = [(e.tokens, j.line) for e, j in zip(made, judgements, strict=True) if not fits(e)]
    kept.append([e for e in made if fits(e)])
    if long:
      tokens, line = max(long)
      notes.append(f'left out {len(long)} {name} examples that are longer than config.reward_model.row_tokens, or an '
                   f'answer than config.model.max_length; the longest is {path}:{line} with {tokens} tokens')
    left_out += len(long)
    if not kept[-1]:
      raise ValueError(f'{path}: every {name} example is too long, the longest has {tokens} tokens: raise '
                       f'config.reward_model.row_tokens {c.row_tokens} or config.model.max_length')
  if c.balance_lengths and c.kind == 'helpfulness':
    balanced = balance(np.array([e.longer for e in kept[0]]))
    if dropped := int((~balanced).sum()):
      notes.append(f'left out {dropped} of {len(kept[0])} training pairs, so that the better answers are as long as '
                   'the others (config.reward_model.balance_lengths)')
    left_out += dropped
    kept[0] = [e for e, keep in zip(kept[0], balanced, strict=True) if keep]
    if not kept[0]:
      raise ValueError(f'{c.path}: of every pair the same answer is the longer one, so no pairs are left with '
                       'comparable lengths: set config.reward_model.balance_lengths to False, or add pairs')
  counts = f'{len(kept[0])} training and {len(kept[1])} held-out examples of {c.path}'
  return Examples(*kept, left_out, [counts, *notes])


def balance(longer_N: np.ndarray) -> np.ndarray:
  """bool [N]: the pairs to keep, so that the differences in length add up to about nothing.

  longer_N: tokens that the better answer has more. The most unequal pairs of the heavier side go first, until the sum
  has changed its sign; what then remains of it is less than the last one's difference.
  """
  longer = np.asarray(longer_N, np.int64)
  total, kept = longer.sum(), np.ones(longer.shape, bool)
  heavy = np.sign(total)
  for n in np.argsort(-longer * heavy, kind='stable'):
    if total * heavy <= 0 or longer[n] * heavy <= 0:
      break
    kept[n], total = False, total - longer[n]
  return kept
