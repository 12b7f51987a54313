"""The rules: is a response well formed, and is its answer the reference?

Everything here reads untrusted text. What can hang, crash or eat memory (math-verify on hostile LaTeX) is
meant to be called in a worker process that `pool.RewardPool` kills from outside; what the parent calls itself
(`format_reward`, `check_kind`) takes linear time. At import only the standard library is loaded, so that a
worker is ready in tens of milliseconds and never loads jax.

A verdict is one of `VERDICTS`. A new kind of problem is one function `(answer, reference) -> verdict` in
`ACCURACY` and one reader of its references in `_REFERENCES`.
"""

import ast
import dataclasses
import difflib
import fractions
import functools
import itertools
import json
import logging
import re
from collections.abc import Callable
from typing import NamedTuple

from moe_rl.rl.rewards import plain_numbers

CORRECT = 'correct'
WRONG = 'wrong'
UNPARSABLE_ANSWER = 'unparsable_answer'
UNPARSABLE_REFERENCE = 'unparsable_reference'
TIMEOUT = 'timeout'
CRASH = 'crash'
VERDICTS = (CORRECT, WRONG, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, TIMEOUT, CRASH)

_TAGS = ('<think>', '</think>', '<answer>', '</answer>')

# Longest answer (characters) that is read at all; the longest reference of MATH has 159.
MAX_ANSWER_CHARS = 10_000
# 4 to 6 numbers need about 40 characters; the limit keeps the expression's parser and walk shallow.
_MAX_EXPRESSION_CHARS = 500


def format_reward(response: str) -> float:
  """1.0 for `<think>…</think> <answer>…</answer>` and nothing else, otherwise 0.0.

  Each tag exactly once and in this order; only whitespace before, between and after the two blocks. What the
  blocks hold is free, also nothing. Linear time, never raises. DeepSeek-R1 (arXiv:2501.12948) sec. 2.2.2.
  """
  text = response.strip()
  if any(text.count(tag) != 1 for tag in _TAGS):
    return 0.0
  if not (text.startswith(_TAGS[0]) and text.endswith(_TAGS[3])):
    return 0.0
  thought_end = text.index(_TAGS[1])
  between = text[thought_end + len(_TAGS[1]):text.index(_TAGS[2])]
  in_order = thought_end < text.index(_TAGS[2])
  return 1.0 if in_order and not between.strip() else 0.0


def extract_answer(response: str) -> str | None:
  """Stripped content of the last complete `<answer>…</answer>`; None when there is none. Linear time."""
  last_end = response.rfind(_TAGS[3])
  start = response.rfind(_TAGS[2], 0, max(last_end, 0))
  if start < 0:
    return None
  start += len(_TAGS[2])
  return response[start:response.index(_TAGS[3], start)].strip()


def _canonical_integer(text: str) -> str | None:
  """`-0,012` -> `-12`, as text: no limit on digits, no conversion cost. None when it is not one integer."""
  match = plain_numbers.INTEGER.fullmatch(text.strip())
  if match is None:
    return None
  digits = match[2].replace(',', '').lstrip('0') or '0'
  return f'-{digits}' if match[1] == '-' and digits != '0' else digits


def integer(answer: str, reference: str) -> str:
  """Verdict for one whole number; spaces around, thousands commas and a leading + are allowed."""
  wanted = _canonical_integer(reference)
  if wanted is None:
    return UNPARSABLE_REFERENCE
  given = _canonical_integer(answer) if len(answer) <= MAX_ANSWER_CHARS else None
  if given is None:
    return UNPARSABLE_ANSWER
  return CORRECT if given == wanted else WRONG


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
  if _has_delimiters(text):
    return readers.latex(text) or readers.unitless(text)
  bare = plain_numbers.tidy(text).replace('$', '')
  if _is_sentence(bare):
    return readers.sentence(bare)
  text = ' '.join(text.replace(',\\!', '').split()).rstrip('.,')
  text = re.sub(r'\*\* *(\w+)', r'^{\1}', text)  # x**12 as programs write it
  return readers.latex(f'${text}$') or readers.unitless(f'${text}$')


@functools.lru_cache(maxsize=4096)  # the answers of a group share their reference
def _parse_reference(reference: str) -> list:
  return _parse_expression(reference)


def _last_value(text: str) -> str:
  """`2*9 = 18` -> `18`: a chain of equalities states its last member. Lists of equations stay whole."""
  if any(mark in text for mark in (',', ';')) or {'and', 'or'}.intersection(text.lower().split()):
    return text
  return text.rpartition('=')[2] if not re.search(r'[<>!\\]=', text) else text


def _same_text(answer: str, reference: str) -> bool:
  r"""Equal as written, spelling aside; if the reference is all words, `\text{Evelyn}`, in any case."""
  given, wanted = (plain_numbers.tidy(text).replace(' ', '') for text in (answer, reference))
  if plain_numbers.TEXT_MACRO.fullmatch(reference.strip()):
    given, wanted = given.casefold(), wanted.casefold()
  return given == wanted


def math(answer: str, reference: str) -> str:
  """Verdict for mathematics as text or LaTeX. May hang or exhaust memory on hostile text: for workers only.

  Plain numbers (also with $, %, commas, units) are compared exactly and cost microseconds; all else goes to
  math-verify, about 20 ms an answer. Lets MemoryError and RecursionError through.
  """
  answer = plain_numbers.unbox(answer).strip()
  wanted = plain_numbers.read(reference, units=False)
  if wanted is None and not _parse_reference(reference):
    return UNPARSABLE_REFERENCE
  if not answer or len(answer) > MAX_ANSWER_CHARS:
    return UNPARSABLE_ANSWER
  given = plain_numbers.read(_last_value(answer), units=True) if wanted else None
  if given and wanted:
    return CORRECT if given.same(wanted) else WRONG
  if wanted is None and _same_text(answer, reference):
    return CORRECT
  readings = _parse_expression(answer)
  if not readings:
    return UNPARSABLE_ANSWER
  return CORRECT if _verified(_parse_reference(reference), readings) else WRONG


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


_OPERATIONS = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a / b,
}  # fmt: skip


def _read_countdown(reference: str) -> tuple[list[int], int] | None:
  """(numbers, target) of `{"numbers": [3, 8, 8], "target": 24}`; None when it is something else."""
  try:
    fields = json.loads(reference)
    numbers, target = fields['numbers'], fields['target']
    integers = all(type(number) is int for number in [*numbers, target])
  except (ValueError, KeyError, TypeError, RecursionError):
    return None
  return (numbers, target) if integers and numbers and isinstance(numbers, list) else None


def _read_arithmetic(text: str) -> ast.expr | None:
  """Syntax tree of integers, + - * / and parentheses; None for anything else, also `**` and `//`."""
  if not re.fullmatch(r'[\d+\-*/() ]+', text, re.ASCII) or re.search(r'\* *\*|/ */', text):
    return None
  try:
    tree = ast.parse(text.strip(), mode='eval').body
  except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: CPython on deep nesting
    return None
  return tree


def _leaves_and_value(node: ast.AST) -> tuple[list[int], fractions.Fraction]:
  """The numbers used and the exact value. Raises ValueError for other syntax, ZeroDivisionError for x/0."""
  if isinstance(node, ast.Constant) and type(node.value) is int:
    return [node.value], fractions.Fraction(node.value)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
    leaves, value = _leaves_and_value(node.operand)
    return leaves, -value if isinstance(node.op, ast.USub) else value
  if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
    left, a = _leaves_and_value(node.left)
    right, b = _leaves_and_value(node.right)
    return left + right, _OPERATIONS[type(node.op)](a, b)
  raise ValueError(f'not arithmetic: {type(node).__name__}')


def countdown(answer: str, reference: str) -> str:
  """Verdict for an expression that must use each number exactly once and reach the target, exactly.

  reference: JSON text `{"numbers": [3, 8, 8], "target": 24}`. An `= 24` tail is allowed, and must be true.
  """
  puzzle = _read_countdown(reference)
  if puzzle is None:
    return UNPARSABLE_REFERENCE
  numbers, target = puzzle
  if len(answer) > _MAX_EXPRESSION_CHARS:
    return UNPARSABLE_ANSWER
  text = ' '.join(answer.translate({0xD7: '*', 0xF7: '/', 0x2212: '-'}).split())
  expression, equals, claimed = text.partition('=')
  claim = _canonical_integer(claimed) if equals else str(target)
  tree = _read_arithmetic(expression)
  if tree is None or claim is None:
    return UNPARSABLE_ANSWER
  try:
    leaves, value = _leaves_and_value(tree)
  except (ValueError, RecursionError):
    return UNPARSABLE_ANSWER
  except ZeroDivisionError:
    return WRONG
  right = sorted(leaves) == sorted(numbers) and value == target and claim == str(target)
  return CORRECT if right else WRONG


ACCURACY: dict[str, Callable[[str, str], str]] = {'integer': integer, 'math': math, 'countdown': countdown}

_REFERENCES: dict[str, tuple[Callable[[str], object], str]] = {
    'integer': (_canonical_integer, 'not one whole number such as 18 or -1,450'),
    'math': (lambda text: plain_numbers.read(text, units=False) or _parse_reference(text),
             'neither a plain number nor mathematics that math-verify can read'),
    'countdown': (_read_countdown, 'not JSON such as {"numbers": [3, 8, 8], "target": 24}'),
}


def check_kind(kind: str) -> None:
  """Raises ValueError, naming the nearest known kind, if no rule has this name."""
  if kind not in ACCURACY:
    near = difflib.get_close_matches(kind, ACCURACY, n=1, cutoff=0.0)[0]
    raise ValueError(f'unknown kind of reward {kind!r}: did you mean {near!r}? Known: {", ".join(ACCURACY)}')


def check_reference(kind: str, reference: str) -> str | None:
  """None if the reference can be graded against, otherwise why not, as one line for people.

  For data at loading time: microseconds for plain numbers; for other references of kind 'math' it imports
  math-verify (seconds, once) and takes milliseconds each, without a time limit. Raises as `check_kind`.
  """
  check_kind(kind)
  if not isinstance(reference, str):
    return f'reference {reference!r} is not text'
  read, complaint = _REFERENCES[kind]
  shown = reference if len(reference) <= 80 else reference[:77] + '...'
  return None if read(reference) else f'reference {shown!r} is {complaint}'


def grade(kind: str, response: str, reference: str) -> tuple[str, float]:
  """(verdict, format reward) of one response. For workers: see `math`. Raises as `check_kind`."""
  check_kind(kind)
  form = format_reward(response)
  answer = extract_answer(response)
  if answer is None:
    return UNPARSABLE_ANSWER, form
  return ACCURACY[kind](answer, reference), form
