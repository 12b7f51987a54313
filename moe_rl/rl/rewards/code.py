"""Programs against their unit tests, each run in `sandbox`.

A reference is JSON in one of these forms, or plain lines of asserts:

  {"tests": ["assert f(1) == 2", ...], "setup": "import math"}
      asserts (MBPP); `setup`, run after the program and before them, may be left out
  {"function": "f", "calls": [[[1, 2], 3], ...]}
      f(1, 2) must return 3; arguments and results are JSON
  {"inputs": ["1 2\\n", ...], "outputs": ["3\\n", ...]}
      standard input and output, white space at line ends aside; with "fn_name": calls, inputs the arguments

MBPP's own names `test_list` and `test_setup_code` will do; a called function may be a method of `class Solution`.

A program is right if all tests pass within the item's time. Asserts and calls are evaluated in a process of their own,
which asks the program's for values (`harness`); standard output is compared outside of the sandbox.
"""

import ast
import inspect
import json
import re
import secrets
import time

from moe_rl.rl.rewards import extract, harness, sandbox
from moe_rl.rl.rewards.verdicts import CORRECT, CRASH, TIMEOUT, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, WRONG

MAX_PROGRAM_CHARS = 100_000
_FENCE = re.compile(r'```[ \t]*([^\s`]*)[^\n`]*\n(.*?)(?:```|\Z)', re.DOTALL)  # (language, block)
_START_S = 0.5  # left for starting and ending the program before the pool's own limit strikes
_budget = sandbox.Limits()

_HARNESS = inspect.getsource(harness)


def configure(timeout_s: float, memory_mb: int) -> None:
  """Fits a program's limits into an item's: its tests share the item's wall seconds."""
  global _budget
  _budget = sandbox.Limits(max(timeout_s - _START_S, timeout_s / 2), max(memory_mb // 4, 128))


def find_program(response: str) -> str | None:
  """The last block fenced as Python in the answer (`extract`'s order, steps 1 and 2), else the last one of no language,
  else the text itself if it is Python."""
  text = extract.tagged_answer(response)
  text = extract.conclusion(response) if text is None else text
  if text is None or len(text) > MAX_PROGRAM_CHARS:
    return None
  fenced = _FENCE.findall(text)
  blocks = [block for language, block in fenced if language.lower() in ('python', 'python3', 'py')]
  blocks = blocks or [block for language, block in fenced if not language]
  if blocks:
    return blocks[-1]
  return text if re.search(r'(?m)^(?:def|class|import|from|print|for|while|\w+ *=)\b', text) else None


def read_reference(reference: str) -> dict | None:
  """The tests as the runner takes them: `{"setup", "function", "tests"}` or `{"inputs", "outputs"}`; else None."""
  try:
    fields = json.loads(reference)
  except (ValueError, RecursionError):
    fields = {'tests': [reference]} if re.search(r'(?m)^\s*assert\b', reference) and _is_python(reference) else None
  if isinstance(fields, list):
    fields = {'tests': fields}
  if not isinstance(fields, dict):
    return None
  if 'inputs' in fields:
    return _pairs(fields)
  calls = fields.get('calls') if isinstance(fields.get('function'), str) else None
  tests = fields.get('tests', fields.get('test_list')) if calls is None else calls
  setup = fields.get('setup') or fields.get('test_setup_code') or ''
  good = isinstance(tests, list) and tests and isinstance(setup, str) and all(
      isinstance(test, str) if calls is None else _is_call(test) for test in tests)
  return {'setup': setup, 'function': fields.get('function'), 'tests': tests} if good else None


def _is_call(test) -> bool:
  return isinstance(test, list) and len(test) == 2 and isinstance(test[0], list)


def _pairs(fields: dict) -> dict | None:
  inputs, outputs = fields['inputs'], fields.get('outputs')
  if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0):
    return None
  if fields.get('fn_name'):
    calls = [list(pair) for pair in zip(inputs, outputs, strict=True)]
    return {'setup': '', 'function': fields['fn_name'], 'tests': calls} if all(map(_is_call, calls)) else None
  return {'inputs': [_lines(text) for text in inputs], 'outputs': [_lines(text) for text in outputs]}


def _lines(text) -> str:
  return '\n'.join(map(str, text)) if isinstance(text, list) else str(text)


def _is_python(text: str) -> bool:
  try:
    ast.parse(text)
  except (SyntaxError, ValueError, MemoryError, RecursionError):
    return False
  return True


def code(program: str, reference: str) -> str:
  """Verdict for a program; takes up to the limit of `configure`. Raises RuntimeError where nothing can contain it."""
  tests = read_reference(reference)
  if tests is None:
    return UNPARSABLE_REFERENCE
  deadline = time.monotonic() + _budget.wall_s
  if 'inputs' not in tests:
    return _run_tests(program, tests, deadline)
  for given, wanted in zip(tests['inputs'], tests['outputs'], strict=True):
    verdict = _run_with_input(program, given, wanted, deadline)
    if verdict != CORRECT:
      return verdict
  return CORRECT


def _limits(deadline: float) -> sandbox.Limits:
  return sandbox.Limits(max(deadline - time.monotonic(), 0.05), _budget.memory_mb)


def _run_tests(program: str, tests: dict, deadline: float) -> str:
  token = secrets.token_hex(16)
  source = program.encode('utf-8', 'surrogatepass')
  stdin = b'%d\n%s%s\n%s' % (len(source), source, json.dumps(tests).encode(), token.encode())
  outcome = sandbox.run(_HARNESS, stdin, _limits(deadline))
  if outcome.report.decode('utf-8', 'replace') == token:
    return CORRECT
  return UNPARSABLE_ANSWER if outcome.status == harness.NOT_PYTHON else _failed(outcome)


def _run_with_input(program: str, given: str, wanted: str, deadline: float) -> str:
  outcome = sandbox.run(program, given.encode('utf-8', 'surrogateescape'), _limits(deadline))
  if outcome.status != 0:
    not_python = b'SyntaxError' in outcome.errors[-2000:] and not outcome.output and not _is_python(program)
    return UNPARSABLE_ANSWER if not_python else _failed(outcome)
  said = outcome.output.decode('utf-8', 'replace')
  return CORRECT if _tidy(said) == _tidy(wanted) else WRONG


def _tidy(text: str) -> list[str]:
  return [line.rstrip() for line in text.rstrip().splitlines()]


def _failed(outcome: sandbox.Outcome) -> str:
  if outcome.late:
    return TIMEOUT
  return CRASH if outcome.status is not None and outcome.status < 0 else WRONG
