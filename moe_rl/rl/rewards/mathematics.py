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

from moe_rl.rl.rewards import extract, plain_numbers, spellings
from moe_rl.rl.rewards.verdicts import CORRECT, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, WRONG

# Longest answer (characters) that is read at all; the longest reference of MATH has 159.
MAX_ANSWER_CHARS = 10_000

_LABELLED = re.compile(
    r'(?:\\(?:text|textbf|mathbf|mathrm|bf) ?\{ ?)?\(([A-J])\)(?: ?\}| ) ?(?:\\ |~|\\quad)? ?([-+$\\\d(].*)', re.DOTALL)
_LETTER = re.compile(r'\(?[A-J]\)?')
_ARTICLE = re.compile(r'(?:an?|the) ', re.IGNORECASE)
_REMARK = re.compile(r'([-+$]?\d[\d.,/]* ?[A-Za-z]{2}[A-Za-z ]*) \(.*\)')  # 42 clips (6 * 7 = 42)
_RATIO = re.compile(r'[^:]+(?::[^:]+){2,}')
_EITHER = re.compile(r'(?<![A-Za-z])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])')
_RAISED = re.compile(r'[\^_] ?(?:\{[^{}]*\}|-?\w)')  # exponents and indices
_MACRO = re.compile(r'\\(?:[A-Za-z]+|.)')
_QUANTITY = r'[-+$]?\d[\d.,/{}]* ?(?!(?:and|or|base|mod)\b)[A-Za-z]{2,}(?:[ /][A-Za-z]+){0,4}'
_QUANTITIES = re.compile(rf'{_QUANTITY}(?: ?,? {_QUANTITY}){{1,9}}')
_BASED = re.compile(r'(?P<digits>[0-9A-Z]+) ?_ ?\{? ?(?P<base>[0-9]{1,2}) ?\}?')


class _MathVerify(NamedTuple):
  """What we use of math-verify: readers of a text, which give a list; and `equality`, which knows sympy."""
  latex: Callable[[str], list]
  unitless: Callable[[str], list]
  sentence: Callable[[str], list]
  same: Callable[..., bool]
  union: Callable[[list], list]


@functools.cache
def load_math_verify() -> _MathVerify:
  """math-verify with its own timeouts off; the first call takes seconds (import, grammar tables).

  Its timeouts rest on signal.alarm, which takes the alarm from the caller, fails outside the main thread and
  says a silent False; the pool's kill from outside replaces them. Raises ImportError if it is not installed.
  """
  from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

  from moe_rl.rl.rewards import equality
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
  loaded = _MathVerify(*readers, equality.same, equality.union)
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
  lines = text.splitlines()
  text = spellings.to_latex(', '.join(lines) if all('=' in line for line in lines) else text)
  if listed := extract.listed_formulas(text):
    text = listed  # math-verify would take one of them
  elif _has_delimiters(text):
    return readers.latex(text) or readers.unitless(text)
  bare = plain_numbers.tidy(text).replace('$', '')
  if _is_sentence(bare):
    return readers.sentence(bare)
  text = ' '.join(text.replace(',\\!', '').split()).rstrip('.,')
  readings = readers.latex(f'${text}$') or readers.unitless(f'${text}$')
  if not readings and text.count('\\pm') == 1:  # within a fraction it is not read
    both = ', '.join(text.replace('\\pm', sign) for sign in '+-')
    readings = readers.latex(f'${both}$')
  return readers.union(readings) if _EITHER.search(text) else readings


def _has_several_quantities(text: str) -> bool:
  """`3 hours 20 minutes`, of which math-verify would take the first alone."""
  bare = _RAISED.sub(' ', plain_numbers.tidy(text))
  return bool(_QUANTITIES.fullmatch(' '.join(_MACRO.sub(' ', bare).split())))


@functools.lru_cache(maxsize=4096)  # the answers of a group share their reference
def _parse_reference(reference: str) -> list:
  readings = _parse_expression(reference)
  if readings or reference.count('=') != 1:
    return readings
  return _parse_expression(reference.partition('=')[2])  # `m_{\max} = n^2`: it is the left side that cannot be read


def _last_value(text: str) -> str:
  """`2*9 = 18` -> `18`: a chain of equalities states its last member. Lists of equations stay whole."""
  if any(mark in text for mark in (',', ';', '\n')) or {'and', 'or'}.intersection(text.lower().split()):
    return text
  return text.rpartition('=')[2] if not re.search(r'[<>!\\]=', text) else text


def spelling(text: str, _=None) -> str:
  """One spelling of what differs in spaces and delimiters only."""
  return plain_numbers.tidy(text).replace(' ', '')


def _same_text(answer: str, reference: str) -> bool:
  r"""Equal as written, spelling aside; if the reference is all words, `\text{Evelyn}`, in any case."""
  given, wanted = spelling(answer), spelling(reference)
  if plain_numbers.TEXT_MACRO.fullmatch(reference.strip()):
    given, wanted = (spelling(_ARTICLE.sub('', plain_numbers.tidy(text))).casefold() for text in (answer, reference))
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
  answer = _bare(answer, reference)
  if not answer or len(answer) > MAX_ANSWER_CHARS:
    return UNPARSABLE_ANSWER
  remark = _REMARK.fullmatch(answer) if len(answer) < 200 else None
  given = plain_numbers.read(_last_value(remark[1] if remark else answer), units=True)
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
  answer = _bare(answer, reference)
  if not answer or len(answer) > MAX_ANSWER_CHARS:
    return UNPARSABLE_ANSWER
  if not is_plain(reference) and _same_text(answer, reference):
    return CORRECT
  wanted, given = _BASED.fullmatch(plain_numbers.tidy(reference)), _BASED.fullmatch(plain_numbers.tidy(answer))
  if wanted and given:  # math-verify reads past the base
    return CORRECT if wanted['digits'] == given['digits'] and wanted['base'] == given['base'] else WRONG
  if _RATIO.fullmatch(plain_numbers.tidy(reference)):
    return WRONG  # 1:3:2 is 1:2:3 to math-verify, which divides
  if _has_several_quantities(answer) or _has_several_quantities(reference):
    return WRONG  # other than as text, they are not compared
  readings = _parse_expression(answer)
  if not readings:
    return UNPARSABLE_ANSWER
  return CORRECT if _verified(_parse_reference(reference), readings) else WRONG


def _bare(answer: str, reference: str) -> str:
  r"""Without its box and words before it; of `\textbf{(B) } 12` the letter, if the reference is one, else the rest."""
  answer = plain_numbers.without_lead(plain_numbers.unbox(answer).strip())
  labelled = _LABELLED.fullmatch(answer) if len(answer) <= MAX_ANSWER_CHARS else None
  if labelled is None or _same_text(answer, reference):
    return answer
  return labelled[1] if _LETTER.fullmatch(plain_numbers.tidy(reference)) else labelled[2]


def _verified(gold: list, readings: list) -> bool:
  """Whether any reading equals one of the reference's; two that cannot be compared are not equal."""
  for wanted, given in itertools.product(gold, readings):
    try:
      if load_math_verify().same(wanted, given):
        return True
    except (MemoryError, RecursionError):
      raise
    except Exception:  # sympy has no common error for "these two cannot be compared"
      continue
  return False
