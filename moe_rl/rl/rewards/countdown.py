"""Countdown: an expression that uses each number once and reaches the target."""

import ast
import fractions
import json
import re

from moe_rl.rl.rewards.plain_numbers import canonical_integer, unbox
from moe_rl.rl.rewards.verdicts import CORRECT, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, WRONG

# 4 to 6 numbers need about 40 characters; the limit keeps the expression's parser and walk shallow.
_MAX_EXPRESSION_CHARS = 500

_SPELLINGS = (('\\left', ''), ('\\right', ''), ('\\times', '*'), ('\\cdot', '*'), ('\\div', '/'), ('\\(', ' '),
              ('\\)', ' '),
              ('\\[', ' '), ('\\]', ' '), ('\\,', ' '), ('\\ ', ' '), ('$', ' '), ('[', '('), (']', ')'),
              ('×', '*'), ('·', '*'), ('÷', '/'), ('−', '-'))
_FRACTION = re.compile(r'\\[dt]?frac *\{([^{}]*)\} *\{([^{}]*)\}')

_OPERATIONS = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a / b,
}  # fmt: skip


def read_reference(reference: str) -> tuple[list[int], int] | None:
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


def _plain(text: str) -> str:
  r"""`\boxed{8 \times \frac{6}{2}}` as people type it: `8 * ((6)/(2))`."""
  text = unbox(text.strip())
  for old, new in _SPELLINGS:
    text = text.replace(old, new)
  while '\\' in text and (flat := _FRACTION.sub(r'((\1)/(\2))', text)) != text:
    text = flat  # from the inside out
  return ' '.join(text.split()).removesuffix('.')


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

  reference: JSON text `{"numbers": [3, 8, 8], "target": 24}`. An `= 24` tail is allowed, and must be true; so are a
  box, math delimiters and LaTeX's operators.
  """
  puzzle = read_reference(reference)
  if puzzle is None:
    return UNPARSABLE_REFERENCE
  numbers, target = puzzle
  if len(answer) > _MAX_EXPRESSION_CHARS:
    return UNPARSABLE_ANSWER
  expression, equals, claimed = _plain(answer).partition('=')
  claim = canonical_integer(claimed) if equals else str(target)
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
