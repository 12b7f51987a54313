"""Rewards: the rules read what people mean, hostile text costs only itself, and nothing is lost or left behind."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from moe_rl.rl.rewards import extract, functions, pool, worker
from moe_rl.rl.rewards import verdicts as names

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(__file__).parents[2] / 'shared' / 'data'
TIMEOUT_S = 2.0


def respond(answer: str) -> str:
  return f'<think>x</think><answer>{answer}</answer>'


def item(kind: str, answer: str, reference: str) -> pool.Item:
  return pool.Item(kind, respond(answer), reference)


def verdicts(grades: list[pool.Grade]) -> list[str]:
  return [grade.verdict for grade in grades]


def is_alive(pid: int) -> bool:
  """Whether a process runs; one that ended and was not reaped yet does not."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False


@pytest.fixture(scope='module')
def graders():
  """One pool for the tests that break nothing. 30 s: here a loaded machine must not turn a verdict to timeout."""
  with pool.RewardPool(workers=2, timeout_s=30.0) as shared_pool:
    yield shared_pool


@pytest.mark.parametrize('response, expected', [
    ('<think>a</think><answer>1</answer>', 1.0),
    ('  \n<think>a\nb</think>\n\n<answer>1</answer> \n', 1.0),
    ('<think></think><answer></answer>', 1.0),
    ('<think>a < b > c </ think></think> <answer>1</answer>', 1.0),
    ('', 0.0),
    ('1', 0.0),
    ('<answer>1</answer>', 0.0),
    ('<think>a</think>', 0.0),
    ('<think>a</think><answer>1', 0.0),
    ('a</think><answer>1</answer>', 0.0),
    ('x<think>a</think><answer>1</answer>', 0.0),
    ('<think>a</think>x<answer>1</answer>', 0.0),
    ('<think>a</think><answer>1</answer>x', 0.0),
    ('<think>a</think><answer>1</answer><answer>1</answer>', 0.0),
    ('<think>a<think>b</think><answer>1</answer>', 0.0),
    ('<think>a</think></think><answer>1</answer>', 0.0),
    ('<think><answer>1</think></answer>', 0.0),
    ('<answer>1</answer><think>a</think>', 0.0),
    ('<think><answer></answer></think>', 0.0),
    ('<Think>a</Think><Answer>1</Answer>', 0.0),
    ('<think>a</think>\x00<answer>1</answer>', 0.0),
])  # fmt: skip
def test_format_is_rewarded_only_for_each_tag_once_and_in_order(response, expected):
  assert functions.format_reward(response) == expected


@pytest.mark.parametrize('response, expected', [
    ('<answer> 18 </answer>', '18'),
    ('<answer>1</answer> so <answer>2</answer> and', '2'),
    ('<answer>1</answer><answer>2', '1'),
    ('<answer>5</answer></answer>', '5'),
    ('<answer><answer>5</answer>', '5'),
    ('<answer></answer>', ''),
    ('</answer><answer>5', None),
    ('<answer>5', None),
    ('5</answer>', None),
    ('', None),
])  # fmt: skip
def test_the_last_complete_answer_is_extracted(response, expected):
  assert extract.tagged_answer(response) == expected


@pytest.mark.parametrize('text', ['<think>', '<answer>', '</answer>', '<answer></answer>', ' ', '<'])
def test_what_the_parent_reads_itself_takes_linear_time(text):
  # 8 MB in well under a second; quadratic time would be hours.
  start = time.perf_counter()
  functions.format_reward(text * (2**23 // len(text)))
  extract.tagged_answer(text * (2**23 // len(text)))
  assert time.perf_counter() - start < 2.0


C, W, A, R = names.CORRECT, names.WRONG, names.UNPARSABLE_ANSWER, names.UNPARSABLE_REFERENCE
PUZZLE = '{"numbers": [3, 8, 8, 10], "target": 24}'
CASES = [
    ('integer', '18', '18', C), ('integer', ' +18\n', '18', C), ('integer', '-0,018', '-18', C),
    ('integer', '1,450', '1450', C), ('integer', '-18', '18', W), ('integer', '073', '73', C),
    ('integer', '-0', '0', C), ('integer', '18.0', '18', A), ('integer', '18 eggs', '18', A),
    ('integer', '1,45', '145', A), ('integer', '', '18', A), ('integer', '1 8', '18', A),
    ('integer', '٣', '3', A), ('integer', '18', 'eighteen', R),

    ('math', '18', '18', C), ('math', '18.00', '18', C), ('math', '$18', '18', C), ('math', '-$18.', '-18', C),
    ('math', '18 dollars', '18', C), ('math', r'18\text{ dollars}', '18', C), ('math', '\\$1,450.50', '1450.5', C),
    ('math', r'\boxed{18}', '18', C), ('math', r'$\boxed{18}$', '18', C), ('math', r'So \boxed{18}.', '18', C),
    ('math', '18%', '18', C), ('math', '50%', '0.5', C), ('math', r'50\%', r'\frac{1}{2}', C),
    ('math', '50%', '0.5%', W), ('math', '3/4', '0.75', C), ('math', r'\dfrac{6}{8}', '3/4', C),
    ('math', '5 million', '5000000', C), ('math', '5 million', '5', W), ('math', '2 dozen', '24', C),
    ('math', 'The answer is 18', '18', C), ('math', '2*9 = 18 dollars', '18', C), ('math', 'x = 18', '18', C),
    ('math', '109,200,000', '109200000', C), ('math', '\u221210', '-10', C), ('math', '**18**', '18', C),
    ('math', '0.1', '0.10000000000000001', W), ('math', '0.333', '1/3', W), ('math', '17', '18', W),
    ('math', '18 or 20', '18', W), ('math', '18 or 20', '20', W), ('math', '2 thirds', '2', W),
    ('math', '17, 18', '18', W), ('math', r'\boxed{17} \boxed{18}', '18', W), ('math', '18 = 17', '18', W),
    ('math', '9**9', '9', W), ('math', '3**3', '27', C), ('math', 'She earns $18 a day', '18', C),
    ('math', r'3\pi', '3', W), ('math', '3 pi', '3', W), ('math', '1/0', '0', W), ('math', '', '18', A),
    ('math', '...', '18', A), ('math', r'\frac{', r'\frac{1}{2}x', A), ('math', '9' * 20_000, '9', A),
    ('math', r'x\cdot\frac12', r'\frac{x}{2}', C), ('math', r'\frac{\sqrt{2}}{2}', r'\frac{1}{\sqrt{2}}', C),
    ('math', '$(x+1)^2$', 'x^2+2x+1', C), ('math', 'x^2+1', 'x^2+2x+1', W), ('math', 'evelyn', r'\text{Evelyn}', C),
    ('math', 'Karla', r'\text{Evelyn}', W), ('math', r'\left(3, \frac{\pi}{2}\right)', r'(3,\pi/2)', C),
    ('math', 'a + b + c', 'c+b+a', C), ('math', '18', '', R), ('math', '18', '...', R),

    ('countdown', '8*3*(10-8)/2', PUZZLE, W), ('countdown', '(10-8)*(8+3)+2', PUZZLE, W),
    ('countdown', '8*(10-8)+8', PUZZLE, W), ('countdown', '8/(8-10)+3', PUZZLE, W), ('countdown', '24', PUZZLE, W),
    ('countdown', '(8-3)*8-10-8', PUZZLE, W), ('countdown', '8/(3-8/3)', '{"numbers":[8,3,8,3],"target":24}', C),
    ('countdown', '8 ÷ (3 − 8/3) = 24', '{"numbers":[8,3,8,3],"target":24}', C),
    ('countdown', r'\boxed{8 \div \left(3-\frac{8}{3}\right)}', '{"numbers":[8,3,8,3],"target":24}', C),
    ('countdown', '8/(3-8/3) = 25', '{"numbers":[8,3,8,3],"target":24}', W),
    ('countdown', '8/(3-8/3) = 24 = 24', '{"numbers":[8,3,8,3],"target":24}', A),
    ('countdown', '3/(8-8)', '{"numbers":[8,3,8],"target":24}', W), ('countdown', '8(3)', PUZZLE, A),
    ('countdown', '8**3', PUZZLE, A), ('countdown', '8//3', PUZZLE, A), ('countdown', '8* *3', PUZZLE, A),
    ('countdown', '__import__("os")', PUZZLE, A), ('countdown', '8 3', PUZZLE, A), ('countdown', '', PUZZLE, A),
    ('countdown', '8+3', '[8, 3]', R), ('countdown', '8+3', '{"numbers": "83", "target": 11}', R),
    ('countdown', '8+3', '{"numbers": [8, true], "target": 11}', R), ('countdown', '8', '[' * 10_000, R),
]  # fmt: skip


def test_each_kind_tells_correct_wrong_and_unparsable_apart(graders):
  grades = graders.grade([item(kind, answer, reference) for kind, answer, reference, _ in CASES])
  seen = [(*case[:3], grade.verdict) for case, grade in zip(CASES, grades, strict=True)]
  assert [case for case in seen if case not in CASES] == []
  counts = pool.count_verdicts(grades)
  assert tuple(counts) == names.VERDICTS and sum(counts.values()) == len(CASES)
  assert all(grade.format == 1.0 and grade.accuracy == (grade.verdict == C) for grade in grades)


def test_a_response_without_an_answer_is_unparsable_and_counted(graders):
  grades = graders.grade([pool.Item(kind, '<think>18', '18') for kind in ('integer', 'math')])
  assert verdicts(grades) == [A, A] and [grade.format for grade in grades] == [0.0, 0.0]
  assert pool.count_verdicts([]) == dict.fromkeys(names.VERDICTS, 0)


def test_references_are_checked_with_a_reason():
  assert functions.check_reference('integer', '1,450') is None
  assert functions.check_reference('math', r'\frac{3}{4}') is None
  assert functions.check_reference('math', r'x^2+\sqrt{3}') is None
  assert functions.check_reference('countdown', PUZZLE) is None
  assert 'whole number' in functions.check_reference('integer', '1.5')
  assert 'not text' in functions.check_reference('math', None)
  assert "'...'" in functions.check_reference('math', '...')
  assert '"target": 24' in functions.check_reference('countdown', '3 8 8')


def test_an_unknown_kind_is_named_with_the_nearest_one(graders):
  for call in (lambda: functions.grade('intger', '', ''), lambda: functions.check_reference('intger', ''),
               lambda: graders.grade([pool.Item('intger', '', '')])):
    with pytest.raises(ValueError, match="'intger'.*did you mean 'integer'"):
      call()


HANGS = [
    item('math', '9^{9^{9^{9}}}', '18'), item('math', '((9!)!)!', '18'), item('math', 'a' * 9_000, '18'),
    item('math', '(' * 2000 + '1' + ')' * 2000, '18'),
]  # fmt: skip
HOSTILE = [
    item('math', r'\frac{1}{' * 1000 + '1' + '}' * 1000, '18'), item('math', 'a' * 100_000, '18'),
    item('math', r'\boxed{\frac{1}{2', '18'), item('math', '}{' * 1000, '18'), item('math', '17\x00', '18'),
    item('math', '\ud800 17', '18'), item('math', '$' * 9_000, '18'), item('math', '10000000!', '18'),
    item('integer', '9' * 100_000, '9'), item('integer', '1\x008', '18'), item('integer', '\ud800', '18'),
    item('countdown', '9**9**9', '{"numbers": [9, 9, 9], "target": 3}'),
    item('countdown', '(' * 50_000 + '9' + ')' * 50_000, '{"numbers": [9], "target": 8}'),
    item('countdown', '(' * 240 + '9' + ')' * 240, '{"numbers": [9], "target": 8}'),
    item('countdown', '-' * 450 + '9', '{"numbers": [9], "target": 8}'),
]  # fmt: skip


def test_hostile_answers_cost_at_most_their_limit_and_no_neighbour_anything():
  neighbours = [item('math', str(i), str(i + i % 2)) for i in range(60)]
  items = neighbours + HANGS + HOSTILE
  random.Random(0).shuffle(items)
  with pool.RewardPool(workers=2, timeout_s=TIMEOUT_S) as graders:
    graders.grade([item('math', 'x', 'y')] * 2)  # start-up is not what is timed here
    start = time.monotonic()
    by_item = dict(zip(items, graders.grade(items), strict=True))
    elapsed = time.monotonic() - start
  assert [by_item[one].verdict for one in neighbours] == [C, W] * 30
  assert [by_item[one].verdict for one in HANGS] == [names.TIMEOUT] * len(HANGS)
  assert not {names.CORRECT, names.CRASH}.intersection(by_item[one].verdict for one in HOSTILE)
  assert all(grade.format == 1.0 for grade in by_item.values())
  # 1 s of slack: the kill comes when the selector wakes, milliseconds late on an idle machine.
  assert max(grade.seconds for grade in by_item.values()) < TIMEOUT_S + 1.0
  # 19 items of at most 2 s each, and a second or two of import after each kill, on 2 workers.
  assert elapsed < 19 * (TIMEOUT_S + 3.0) / 2


def test_order_is_kept_and_what_does_not_fit_a_pipe_arrives(graders):
  # 200 responses of up to 200 kB against a pipe of 64 kB: a blocking write on both sides would never end.
  sizes = [random.Random(i).choice([0, 10, 200_000]) for i in range(200)]
  items = [pool.Item('integer', '<think>' + 'é\x00' * (size // 2) + f'</think><answer>{i}</answer>', str(i // 2 * 2))
           for i, size in enumerate(sizes)]  # fmt: skip
  grades = graders.grade(items)
  assert verdicts(grades) == [C, W] * 100
  assert all(grade.format == 1.0 for grade in grades)
  assert graders.grade([]) == []


def test_a_worker_killed_from_outside_costs_the_item_in_work_alone():
  items = [item('math', str(i), str(i)) for i in range(40)]
  items.insert(20, HANGS[0])
  with pool.RewardPool(workers=1, timeout_s=60.0) as graders:
    graders.grade([item('math', 'x', 'y')])
    victim = graders._team[0].process.pid
    threading.Timer(1.0, os.kill, (victim, signal.SIGKILL)).start()
    start = time.monotonic()
    grades = graders.grade(items)
    assert time.monotonic() - start < 30.0  # far from the limit of 60 s: the death is noticed, not waited for
    assert verdicts(grades[:20] + grades[21:]) == [C] * 40
    assert grades[20].verdict == names.CRASH and grades[20].format == 1.0

    idle = graders._team[0].process.pid
    assert idle != victim
    os.kill(idle, signal.SIGKILL)
    while is_alive(idle):
      time.sleep(0.01)
    assert verdicts(graders.grade(items[:20])) == [C] * 20  # one that dies while idle costs nothing


def test_after_close_no_process_is_left_and_the_pool_says_so():
  graders = pool.RewardPool(workers=2, timeout_s=TIMEOUT_S)
  graders.close()  # one that never started
  with pool.RewardPool(workers=2, timeout_s=TIMEOUT_S) as graders:
    graders.grade([item('integer', '1', '1')] * 50)
    pids = [member.process.pid for member in graders._team]
    assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    assert all(os.getpgid(pid) == pid != os.getpgid(0) for pid in pids)  # a Ctrl-C does not reach them
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)
  graders.close()
  with pytest.raises(RuntimeError, match='closed'):
    graders.grade([])


def test_an_interrupted_call_leaks_no_verdict_into_the_next():
  class StopNow(Exception):
    pass

  def stop(*unused):
    raise StopNow

  old = signal.signal(signal.SIGALRM, stop)
  try:
    with pool.RewardPool(workers=2, timeout_s=60.0) as graders:
      signal.setitimer(signal.ITIMER_REAL, 1.0)
      with pytest.raises(StopNow):
        graders.grade([HANGS[0]] * 4)
      assert verdicts(graders.grade([item('integer', '1', '1'), item('integer', '1', '2')])) == [C, W]
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, old)


def test_workers_end_by_themselves_when_the_parent_is_killed():
  script = textwrap.dedent('''
      import sys, threading, time
      from moe_rl.rl.rewards import pool
      graders = pool.RewardPool(workers=2, timeout_s=1.0)
      graders.grade([pool.Item('math', '', '1')] * 20)
      for member in graders._team:
        member.timeout_s = 1e6  # the parent does not kill: only the worker's own limit is left
      hang = pool.Item('math', '<answer>9^{9^{9^{9}}}</answer>', '18')
      pids = lambda: [pid for member in graders._team for pid in (member.process.pid, member.child)]
      threading.Timer(0.5, lambda: print(*pids(), flush=True)).start()
      graders.grade([hang])
  ''')
  parent = subprocess.Popen([sys.executable, '-c', script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  pids = [int(pid) for pid in parent.stdout.readline().split()]
  parent.kill()
  parent.wait()
  parent.stdout.close()
  assert len(pids) == 4
  # One idles and sees the end of its input; one hangs in C and is ended by 4 s of CPU time at most.
  deadline = time.monotonic() + 30.0
  while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(is_alive(pid) for pid in pids)


def test_workers_inherit_limits_and_no_secrets(graders, monkeypatch):
  monkeypatch.setenv('SECRET_TOKEN', 'x')
  with pool.RewardPool(workers=1, timeout_s=TIMEOUT_S, memory_mb=512) as limited:
    limited.grade([item('integer', '1', '1')])
    child = pathlib.Path(f'/proc/{limited._team[0].child}')
    assert b'SECRET_TOKEN' not in (child / 'environ').read_bytes()
    limits = dict((line[:26].strip(), line[26:].split()[0])
                  for line in (child / 'limits').read_text().splitlines()[1:])  # fmt: skip
  assert limits['Max address space'] == str(512 * 2**20)
  assert limits['Max core file size'] == '0'
  assert limits['Max file size'] == str(16 * 2**20)
  assert int(limits['Max cpu time']) <= 2 * TIMEOUT_S + 3


def test_out_of_memory_and_stack_are_crashes_of_the_item(monkeypatch):
  for error, fit in ((MemoryError, False), (RecursionError, True)):
    def fail(*unused, error=error):
      raise error
    rule = dataclasses.replace(functions.ACCURACY['integer'], verdict=fail)
    monkeypatch.setitem(functions.ACCURACY, 'integer', rule)
    assert worker._grade('integer', respond('1'), '1') == (names.CRASH, 1.0, fit)


def test_a_worker_that_cannot_start_is_an_error_with_the_reason_and_a_remedy(monkeypatch, tmp_path):
  python = tmp_path / 'python'
  python.write_text('#!/bin/sh\necho no module named sympy >&2\nexit 1\n')
  python.chmod(0o755)
  with monkeypatch.context() as patch:
    patch.setattr(sys, 'executable', str(python))
    with pool.RewardPool() as graders, pytest.raises(RuntimeError, match='(?s)no module named sympy.*Remedy'):
      graders.grade([item('integer', '1', '1')])
    patch.setattr(sys, 'executable', str(tmp_path / 'nothing'))
    with pool.RewardPool() as graders, pytest.raises(RuntimeError, match='cannot start.*nothing'):
      graders.grade([item('integer', '1', '1')])
  (tmp_path / 'math_verify.py').write_text('raise ImportError("not here")')
  monkeypatch.syspath_prepend(tmp_path)
  with pool.RewardPool() as graders:
    assert verdicts(graders.grade([item('integer', '1', '1')])) == [C]
    with pytest.raises(RuntimeError, match='(?s)math-verify cannot be loaded.*not here.*Remedy'):
      graders.grade([item('math', 'x', 'x')])


@pytest.mark.parametrize('sizes', [{'workers': 0}, {'timeout_s': 0.0}, {'memory_mb': 64}])
def test_sizes_that_cannot_work_are_refused(sizes):
  with pytest.raises(ValueError, match=next(iter(sizes)).split('_')[0]):
    pool.RewardPool(**sizes)


def test_easy_items_cost_well_under_a_millisecond(graders):
  items = [item('integer', str(i), str(i)) for i in range(256)]
  graders.grade(items)
  seconds = []
  for _ in range(9):
    start = time.perf_counter()
    graders.grade(items)
    seconds.append(time.perf_counter() - start)
  # Measured 16 to 33 ms on 2 cores, 90 to 150 with five other programs on them.
  assert min(seconds) < 0.25


def load_answers(path: pathlib.Path) -> list[str]:
  if not path.exists():
    pytest.skip(f'{path} is not on this machine: it comes with the data folder beside the checkout')
  return [json.loads(line)['answer'].rpartition('#### ')[2].strip() for line in path.open()]


def test_every_gsm8k_reference_equals_itself_and_no_other(graders):
  references = load_answers(DATA / 'gsm8k' / 'test.jsonl')
  assert len(references) == 1319
  assert [ref for ref in references if functions.check_reference('math', ref)] == []
  counts = pool.count_verdicts(graders.grade([item('math', ref, ref) for ref in references]))
  assert counts[C] == 1319
  shuffled = random.Random(0).sample(references, len(references))
  pairs = [(a, b) for a, b in zip(references, shuffled, strict=True) if a.replace(',', '') != b.replace(',', '')]
  counts = pool.count_verdicts(graders.grade([item('math', a, b) for a, b in pairs]))
  assert len(pairs) > 1200 and counts[W] == len(pairs)


def test_math_references_equal_themselves_and_no_other(graders):
  references = load_answers(DATA / 'math' / 'math500_test.jsonl')[::5]
  assert len(references) == 100
  grades = graders.grade([item('math', ref, ref) for ref in references])
  assert pool.count_verdicts(grades)[C] == 100
  # Next to each other in the file are different problems; ties are the equal texts.
  pairs = [(a, b) for a, b in zip(references, references[1:], strict=False) if a != b]
  wrong = [pair for pair, grade in zip(pairs, graders.grade([item('math', *pair) for pair in pairs]), strict=True)
           if grade.verdict == C]  # fmt: skip
  assert wrong == []
