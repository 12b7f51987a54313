"""Is a mathematical answer the reference? Plain numbers exactly, all else through math-verify.

math-verify can hang, crash or eat memory on hostile LaTeX, so `math` is meant for a worker process that
`pool.RewardPool` kills from outside. At import only the standard library is loaded.
"""

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Callable
from typing import NamedTuple

from moe_rl.rl.rewards import plain_numbers, spellings
from moe_rl.rl.rewards.verdicts import CORRECT, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, WRONG

# Longest answer (characters) that is read at all; the longest reference of MATH has 159.
MAX_ANSWER_CHARS = 10_000

_BASED = re.compile(r'(?P<digits>[0-9A-Z]+) ?_ ?\{? ?(?P<base>[0-9]{1,2}) ?\}?')


class _MathVerify(NamedTuple):
  """What we use of math-verify: readers of a text, which give a list, and `verify(gold, reading) -> bool`."""
  latex: Callable[[str], list]
  unitless: Callable[[str], list]
  sentence: Callable[[str], list]
  verify: Callable[..., bool]


@functools.cache
def load_math_verify() -> _MathVerify:
  """math-verify with its own timeouts off; the first call takes seconds (import, grammar tables).

  Its timeouts rest on signal.alarm, which takes the alarm from the caller, fails outside the main thread and
  says a silent False; the pool's kill from outside replaces them. Raises ImportError if it is not installed.
  """
  from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
  for name in ('math_verify', 'latex2sympy2_extended'):
    logging.getLogger(name).setLevel(logging.CRITICAL)  # it warns once that its timeouts are off
  latex = LatexExtractionConfig()
  # Taking units away also takes the c of a + b + c: so once more without.
  unitless = LatexExtractionConfig(
      normalization_config=dataclasses.replace(latex.normalization_config, units=False))
  # No fallback: text it cannot read is no reading. One way of reading at a time: where LaTeX fails, the other
  # would find some number inside it, and call 9**9 a 9.
  readers = (functools.partial(parse, extraction_config=[config], parsing_timeout=None, fallback_mode='no_fallback')
             for config in (latex, unitless, ExprExtractionConfig()))
  # With raise_on_error, out of memory and stack can be told from "not equal".
  loaded = _MathVerify(*readers, functools.partial(verify, timeout_seconds=None, raise_on_error=True))
  loaded.latex('$\\frac{1}{2}$')  # builds the grammar's tables
  return loaded


def is_loaded() -> bool:
  """Whether math-verify is imported in this process."""
  return load_math_verify.cache_info().currsize > 0


def _has_delimiters(text: str) -> bool:
  """Whether the text says itself which part of it is mathematics; a single $ is a currency."""
  return text.replace('\\$', '').count('$') > 1 or any(mark in text for mark in ('\\(', '\\[', '\\boxed'))


def _is_sentence(bare: str) -> bool:
  """Words around one number, such as `The answer is 18`; with more it would be a guess which one counts."""
  words = re.findall(r'(?<![\\A-Za-z])[A-Za-z]+', bare.lower())
  numbers = re.findall(r'\d[\d.,/]*', bare)
  words_alone = '\\' not in bare and any(len(word) > 2 for word in words)
  return words_alone and len(numbers) == 1 and not plain_numbers.NOT_UNITS.intersection(words)


def _parse_expression(text: str) -> list:
  """math-verify's readings of a text, best first; empty when it finds none. May hang: for workers only."""
  readers = load_math_verify()
  text = spellings.to_latex(text)
  if _has_delimiters(text):
    return readers.latex(text) or readers.unitless(text)
  bare = plain_numbers.tidy(text).replace('$', '')
  if _is_sentence(bare):
    return readers.sentence(bare)
  text = ' '.join(text.replace(',\\!', '').split()).rstrip('.,')
  return readers.latex(f'${text}$') or readers.unitless(f'${text}$')


@functools.lru_cache(maxsize=4096)  # the answers of a group share their reference
def _parse_reference(reference: str) -> list:
  readings = _parse_expression(reference)
  if readings or reference.count('=') != 1:
    return readings
  return _parse_expression(reference.partition('=')[2])  # `m_{\max} = n^2`: it is the left side that cannot be read


def _last_value(text: str) -> str:
  """`2*9 = 18` -> `18`: a chain of equalities states its last member. Lists of equations stay whole."""
  if any(mark in text for mark in (',', ';')) or {'and', 'or'}.intersection(text.lower().split()):
    return text
  return text.rpartition('=')[2] if not re.search(r'[<>!\\]=', text) else text


def spelling(text: str, _=None) -> str:
  """One spelling of what differs in spaces and delimiters only."""
  return plain_numbers.tidy(text).replace(' ', '')


def _same_text(answer: str, reference: str) -> bool:
  r"""Equal as written, spelling aside; if the reference is all words, `\text{Evelyn}`, in any case."""
  given, wanted = spelling(answer), spelling(reference)
  if plain_numbers.TEXT_MACRO.fullmatch(reference.strip()):
    given, wanted = given.casefold(), wanted.casefold()
  return given == wanted


def is_plain(reference: str) -> bool:
  """Whether a reference is one plain number: read in microseconds, whatever it is."""
  return plain_numbers.read(reference, units=False) is not None


def read_reference(reference: str) -> object:
  """Anything true if `math` can grade against this reference. May hang, like `math`."""
  return is_plain(reference) or _parse_reference(reference)


def plainly(answer: str, reference: str) -> str | None:
  """The verdict where two plain numbers, or no answer, decide it in microseconds; None where math-verify must look."""
  wanted = plain_numbers.read(reference, units=False)
  if wanted is None:
    return None
  answer = _bare(answer)
  if not answer or len(answer) > MAX_ANSWER_CHARS:
    return UNPARSABLE_ANSWER
  given = plain_numbers.read(_last_value(answer), units=True)
  return given and (CORRECT if given.same(wanted) else WRONG)


def math(answer: str, reference: str) -> str:
  """Verdict for mathematics as text or LaTeX. May hang or exhaust memory on hostile text: for workers only.

  Plain numbers (also with $, %, commas, units) are compared exactly and cost microseconds; all else goes to
  math-verify, about 20 ms an answer. Lets MemoryError and RecursionError through.
  """
  verdict = plainly(answer, reference)
  if verdict is not None:
    return verdict
  if not read_reference(reference):
    return UNPARSABLE_REFERENCE
  answer = _bare(answer)
  if not answer or len(answer) > MAX_ANSWER_CHARS:
    return UNPARSABLE_ANSWER
  if not is_plain(reference) and _same_text(answer, reference):
    return CORRECT
  wanted, given = _BASED.fullmatch(plain_numbers.tidy(reference)), _BASED.fullmatch(plain_numbers.tidy(answer))
  if wanted and given:  # math-verify reads past the base
    return CORRECT if wanted['digits'] == given['digits'] and wanted['base'] == given['base'] else WRONG
  readings = _parse_expression(answer)
  if not readings:
    return UNPARSABLE_ANSWER
  return CORRECT if _verified(_parse_reference(reference), readings) else WRONG


def _bare(answer: str) -> str:
  return plain_numbers.without_lead(plain_numbers.unbox(answer).strip())


def _verified(gold: list, readings: list) -> bool:
  """Whether any reading equals one of the reference's; two that cannot be compared are not equal."""
  for wanted, given in itertools.product(gold, readings):
    try:
      if load_math_verify().verify(wanted, given):
        return True
    except (MemoryError, RecursionError):
      raise
    except Exception:  # sympy has no common error for "these two cannot be compared"
      continue
  return False
