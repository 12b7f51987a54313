"""The terms of the reward and their weights: `accuracy=1,format=0.1,language:en=0.5,overlong=1`.

  accuracy       1 for a correct answer, else 0, by the rule of the problem's kind (`functions.ACCURACY`).
  format         1 for the tags exactly once, in order, with nothing outside, else 0 (`extract.format_reward`).
  language[:xx]  share of the thinking's words that are in language xx, 0 to 1, or in the question's own language
                 (`language.share`); 0 without thinking. DeepSeek-R1 (arXiv:2501.12948) sec. 2.3.2.
  repetition[:n] minus the share of the response's runs of n words (8) that were there before: -1 to 0.
                 Yeo et al. (arXiv:2502.03373) sec. 4.1 punish each such token; this is their mean.
  length         within a group: +0.5 for the shortest to -0.5 for the longest, wrong answers at most 0.
                 Kimi k1.5 (arXiv:2501.12599) sec. 2.3.3.
  overlong[:n]   0 up to n tokens (a fifth of the longest response) before the longest, then falling to -1 there.
                 DAPO (arXiv:2503.14476) eq. 13.
  model          the number of the reward model config.rewards.model (`model.RewardModel`), on general prompts.

A general prompt (kind `open`) has no reference: there accuracy and length are 0, and model is 0 on all others. So the
reward is R1's: rules and language for reasoning, model, format and language for the rest (arXiv:2501.12948v2).

The reward is their weighted sum. `language` and `repetition` read text, in the reward workers; `length` and `overlong`
count tokens, in the trainer, which runs the model too. A new term is one function here and one line in `TERMS`.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable

import numpy as np

from moe_rl.rl.rewards import text_terms, verdicts

ACCURACY, FORMAT, MODEL = 'accuracy', 'format', 'model'


def length(tokens_BxG: np.ndarray, correct_BxG: np.ndarray, **_) -> np.ndarray:
  """float32 [B, G] in -0.5..0.5: short answers before long ones of the same group; 0 where all are as long.

  tokens_BxG: of the responses; correct_BxG: 1 or 0.
  """
  tokens = np.asarray(tokens_BxG, np.float32)
  least, most = tokens.min(1, keepdims=True), tokens.max(1, keepdims=True)
  score = np.where(most > least, 0.5 - (tokens - least) / np.maximum(most - least, 1), 0.0)
  return np.where(correct_BxG > 0, score, np.minimum(score, 0.0)).astype(np.float32)


def overlong(tokens_BxG: np.ndarray, max_new: int, argument: str = '', **_) -> np.ndarray:
  """float32 [B, G] in -1..0: 0 up to max_new less the cache, falling to -1 at max_new. All in tokens."""
  cache = overlong_cache(max_new, argument)
  return -np.clip((np.asarray(tokens_BxG, np.float32) - (max_new - cache)) / cache, 0.0, 1.0)


def overlong_cache(max_new: int, argument: str = '') -> int:
  """Tokens over which `overlong` falls: as given, or a fifth of the longest response (DAPO: 4,096 of 20,480)."""
  return int(argument) if argument else max(max_new // 5, 1)


def _whole_number(argument: str) -> None:
  if not re.fullmatch('[1-9][0-9]{0,8}', argument):
    raise ValueError(f'{argument!r} is no whole number of 1 or more')


# Name -> the function of the trainer, None where a worker or the grade gives it; what its argument must be, None if it
# takes none.
TERMS: dict[str, tuple[Callable | None, Callable[[str], None] | None]] = {
    ACCURACY: (None, None), FORMAT: (None, None), MODEL: (None, None), 'length': (length, None),
    'overlong': (overlong, _whole_number),
    **{name: (None, check) for name, (_, check) in text_terms.TERMS.items()}}


@dataclasses.dataclass(frozen=True)
class Term:
  """name: a key of `TERMS`; argument: what stands after its colon; weight: its factor in the reward."""

  name: str
  argument: str
  weight: float

  @property
  def key(self) -> str:
    return f'{self.name}:{self.argument}' if self.argument else self.name


def parse(text: str) -> tuple[Term, ...]:
  """`accuracy=1,format=0.1` as terms in this order; those of weight 0 are left out.

  Raises ValueError for an unknown or repeated term, naming the nearest, for a bad argument or weight, and if none is
  left.
  """
  terms = []
  for part in filter(None, map(str.strip, text.split(','))):
    key, equals, weight = (piece.strip() for piece in part.partition('='))
    name, colon, argument = key.partition(':')
    if name not in TERMS:
      near = difflib.get_close_matches(name, TERMS, 1, 0.5)
      raise ValueError(f'there is no term {name!r}' + (f': did you mean {near[0]!r}?' if near else
                                                       f': use some of {", ".join(TERMS)}'))
    _check_argument(name, argument if colon else None)
    if name in [term.name for term in terms]:
      raise ValueError(f'the term {name!r} stands there twice: keep one')
    terms.append(Term(name, argument, _number(part, weight if equals else '')))
  terms = tuple(term for term in terms if term.weight)
  if not terms:
    raise ValueError(f"{text!r} leaves no term with a weight: write such as 'accuracy=1,format=0.1'")
  return terms


def _check_argument(name: str, argument: str | None) -> None:
  check = TERMS[name][1]
  if argument is None:
    return
  if check is None:
    raise ValueError(f'the term {name!r} takes no argument: leave out :{argument}')
  try:
    check(argument)
  except ValueError as error:
    raise ValueError(f'the term {name}:{argument}: {error}') from None


def _number(part: str, weight: str) -> float:
  try:
    number = float(weight)
  except ValueError:
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(f'{part!r} has no number for a weight: write such as {part.partition("=")[0].strip()}=0.5')
  return number


def validate(text: str, max_new: int) -> tuple[Term, ...]:
  """`parse`, and whether the terms fit a longest response of max_new tokens. Raises ValueError."""
  terms = parse(text)
  for term in terms:
    if term.name == 'overlong' and overlong_cache(max_new, term.argument) > max_new:
      raise ValueError(f'the term {term.key}: more tokens than the longest response has ({max_new}): lower it')
  return terms


def for_workers(terms: tuple[Term, ...], question: str) -> tuple[str, ...]:
  """The terms that a worker is to tell of an answer to this question, as `pool.Item.terms`."""
  return tuple(text_terms.resolve(term.key, question) for term in terms if term.name in text_terms.TERMS)


@dataclasses.dataclass(frozen=True)
class Rewards:
  """reward: float32 [B, G], 0 where the sample is left out; kept: bool [B, G], False where the reference cannot be
  read, so that the sample must be left out of the loss; scores: float32 [B, G] by the key of the term, unweighted."""

  reward: np.ndarray
  kept: np.ndarray
  scores: dict[str, np.ndarray]


def rewards(terms: tuple[Term, ...], grades: list, tokens_BxG: np.ndarray, max_new: int,
            judged_BxG: np.ndarray | None = None) -> Rewards:
  """The weighted sum. grades: `pool.Grade`s of items with `for_workers` terms, prompts outer, samples inner.

  judged_BxG: float32, the reward model's numbers, 0 on prompts that are not general; needed where `model` is weighed.
  """
  shape = np.shape(tokens_BxG)

  def array(values) -> np.ndarray:
    return np.array(list(values), np.float32).reshape(shape)
  scores = {ACCURACY: array(g.accuracy for g in grades), FORMAT: array(g.format for g in grades)}
  worked = [term for term in terms if term.name in text_terms.TERMS]
  scores |= {term.key: array(g.scores[i] for g in grades) for i, term in enumerate(worked)}
  is_open = open_prompts(grades, shape)
  for term in terms:
    function = TERMS[term.name][0]
    if term.name == MODEL:
      scores[term.key] = np.asarray(judged_BxG, np.float32).reshape(shape)
    if function is not None:
      scores[term.key] = function(tokens_BxG=tokens_BxG, correct_BxG=scores[ACCURACY], max_new=max_new,
                                  argument=term.argument)
    if term.name == 'length':
      scores[term.key] = np.where(is_open[:, None], np.float32(0), scores[term.key])
  kept = np.array([g.verdict != verdicts.UNPARSABLE_REFERENCE for g in grades]).reshape(shape)
  total = sum(np.float32(term.weight) * scores[term.key] for term in terms)
  return Rewards(np.where(kept, total, np.float32(0)).astype(np.float32), kept, scores)


def open_prompts(grades: list, shape: tuple[int, int]) -> np.ndarray:
  """bool [B]: the prompts without a reference; a check that was cut short does not hide one."""
  return np.array([g.verdict == verdicts.OPEN for g in grades]).reshape(shape).any(1)


def means(scores: dict[str, np.ndarray], open_B: np.ndarray) -> dict[str, float]:
  """The mean of each term over the prompts that it is about; terms that are about none of them are left out."""
  about = {ACCURACY: ~open_B, 'length': ~open_B, MODEL: open_B}
  parts = {key: score[about.get(key, np.ones_like(open_B))] for key, score in scores.items()}
  return {key: part.mean() for key, part in parts.items() if part.size}
