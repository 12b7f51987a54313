"""The registry of rules: which text of a response is its answer, and whether that answer is the reference.

Everything here reads untrusted text. What can hang, crash or eat memory (math-verify on hostile LaTeX, programs)
is meant to be called in a worker process that `pool.RewardPool` kills from outside; what the parent calls itself
(`format_reward`, `check_kind`) takes linear time. At import only the standard library is loaded, so that a worker
is ready in tens of milliseconds and never loads jax.

A new kind of problem is one function `(answer, reference) -> verdict` and one `Rule` in `ACCURACY`.
"""

import dataclasses
import difflib
from collections.abc import Callable

from moe_rl.rl.rewards import choices, code, countdown, extract, language, mathematics, plain_numbers, text_terms
from moe_rl.rl.rewards.extract import format_reward
from moe_rl.rl.rewards.mathematics import MAX_ANSWER_CHARS
from moe_rl.rl.rewards.verdicts import CORRECT, OPEN, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, WRONG


def integer(answer: str, reference: str) -> str:
  """Verdict for one whole number; spaces around, thousands commas and a leading + are allowed."""
  wanted = plain_numbers.canonical_integer(reference)
  if wanted is None:
    return UNPARSABLE_REFERENCE
  given = plain_numbers.canonical_integer(answer) if len(answer) <= MAX_ANSWER_CHARS else None
  if given is None:
    return UNPARSABLE_ANSWER
  return CORRECT if given == wanted else WRONG


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one kind of problem is graded.

  verdict: (answer, reference) -> one of `verdicts.VERDICTS`.
  extract: response -> its answer, None without one: `extract.tagged_answer` demands the tags.
  readable: whether a reference can be graded against, as anything true; complaint: what it is otherwise.
  quick: reference -> whether `readable` takes microseconds and cannot hang, so that the parent may ask itself.
  normal: (answer, reference) -> one spelling of answers that are the same; linear time, for the parent.
  compares: whether answers of different spelling may still be equal: one is `verdict` CORRECT with the other as
    reference.
  """
  verdict: Callable[[str, str], str]
  extract: Callable[[str], str | None]
  readable: Callable[[str], object]
  complaint: str
  quick: Callable[[str], object] = lambda reference: True
  normal: Callable[[str, str], object] = lambda answer, reference: ' '.join(answer.split())
  compares: bool = False


ACCURACY: dict[str, Rule] = {
    'integer': Rule(integer, extract.tagged_answer, plain_numbers.canonical_integer,
                    'not one whole number such as 18 or -1,450',
                    normal=lambda answer, reference: plain_numbers.canonical_integer(answer)),
    'math': Rule(mathematics.math, extract.final_answer, mathematics.read_reference,
                 'neither a plain number nor mathematics that math-verify can read', mathematics.is_plain,
                 normal=mathematics.spelling, compares=True),
    'countdown': Rule(countdown.countdown, extract.tagged_answer, countdown.read_reference,
                      'not JSON such as {"numbers": [3, 8, 8], "target": 24}'),
    'choice': Rule(choices.choice, choices.find_choice, choices.read_reference,
                   'neither a letter nor JSON such as {"answer": "C", "choices": ["4", "5", "6"]}',
                   normal=choices.letter),
    'exact': Rule(choices.exact, extract.tagged_answer, str.strip, 'empty'),
    'code': Rule(code.code, code.find_program, code.read_reference,
                 'no tests: write asserts, or JSON such as {"tests": ["assert f(1) == 2"]}'),
    'open': Rule(lambda answer, reference: OPEN, lambda response: '', lambda reference: True,
                 'not needed: a general question has no reference'),
}


def check_kind(kind: str) -> None:
  """Raises ValueError, naming the nearest known kind, if no rule has this name."""
  if kind not in ACCURACY:
    near = difflib.get_close_matches(kind, ACCURACY, n=1, cutoff=0.0)[0]
    raise ValueError(f'unknown kind of reward {kind!r}: did you mean {near!r}? Known: {", ".join(ACCURACY)}')


def check_reference(kind: str, reference: str) -> str | None:
  """None if the reference can be graded against, otherwise why not, as one line for people.

  May hang where the rule's `quick` says no: then for workers only, see `pool.RewardPool.check`. Raises as
  `check_kind`.
  """
  check_kind(kind)
  if not isinstance(reference, str):
    return f'reference {reference!r} is not text'
  return None if ACCURACY[kind].readable(reference) else complaint(kind, reference)


def complaint(kind: str, reference: str) -> str:
  """What is wrong with a reference that cannot be graded against, as one line for people."""
  shown = reference if len(reference) <= 80 else reference[:77] + '...'
  return f'reference {shown!r} is {ACCURACY[kind].complaint}'


def as_response(kind: str, text: str) -> str:
  """A response to grade, of a model's raw output or a bare answer: where a rule demands the tags, a text without any
  of them is taken for the answer itself."""
  bare = ACCURACY[kind].extract is extract.tagged_answer and not any(tag in text for tag in extract.TAGS)
  return f'<answer>{text}</answer>' if bare else text


def missing_library(kind: str, response: str, reference: str, terms: tuple[str, ...] = ()) -> str | None:
  """The key in `LIBRARIES` of what grading would have to import first (seconds, once a process), or None."""
  if kind == 'math' and not mathematics.is_loaded():
    answer = extract.final_answer(response)
    if not mathematics.is_plain(reference) or (answer is not None and mathematics.plainly(answer, reference) is None):
      return 'math-verify'
  return 'py3langid' if text_terms.needs_model(terms) and not language.is_loaded() else None


LIBRARIES: dict[str, Callable[[], object]] = {
    'math-verify': mathematics.load_math_verify, 'py3langid': language.load}


def grade(kind: str, response: str, reference: str) -> tuple[str, float]:
  """(verdict, format reward) of one response. For workers: see `mathematics`. Raises as `check_kind`."""
  check_kind(kind)
  rule, form = ACCURACY[kind], format_reward(response)
  answer = rule.extract(response)
  if answer is None:
    return (UNPARSABLE_ANSWER if rule.readable(reference) else UNPARSABLE_REFERENCE), form
  return rule.verdict(answer, reference), form

