"""Programs: right ones pass, wrong ones fail, and hostile ones reach nothing outside of their sandbox."""

import json
import os
import pathlib
import shutil
import socket
import sys
import threading
import time

import hostile_programs
import pytest

from moe_rl.rl.rewards import code, functions, pool, sandbox
from moe_rl.rl.rewards.verdicts import CORRECT, CRASH, TIMEOUT, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, WRONG

ADD = 'def add(a, b):\n  return a + b'
TESTS = json.dumps({'tests': ['assert add(1, 2) == 3', 'assert add(-1, 1) == 0']})
CALLS = json.dumps({'function': 'add', 'calls': [[[1, 2], 3], [['a', 'b'], 'ab']]})
SUMS = json.dumps({'inputs': ['1 2\n', '3 4\n'], 'outputs': ['3\n', '7\n']})
READ_ADD = 'a, b = map(int, input().split())\nprint(a + b)'


@pytest.fixture(scope='module')
def graders():
  with pool.RewardPool(workers=2, timeout_s=20.0) as shared_pool:
    yield shared_pool


def fenced(program: str) -> str:
  return f'<think>hm</think>Here it is:\n```python\n{program}\n```\nDone.'


CASES = [
    (fenced(ADD), TESTS, CORRECT), (f'<think>hm</think><answer>{ADD}</answer>', TESTS, CORRECT), (ADD, TESTS, CORRECT),
    (f'<answer>```\n{ADD}\n```</answer>', CALLS, CORRECT),
    (ADD, 'assert add(1, 2) == 3\nassert add(0, 0) == 0', CORRECT),
    (READ_ADD, SUMS, CORRECT), (ADD, '{"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}', CORRECT),
    ('import math\ndef f(x): return math.sqrt(x)',
     '{"tests": ["assert math.isclose(f(2), r)"], "setup": "r = 2**0.5"}', CORRECT),
    (ADD.replace('+', '-'), TESTS, WRONG), (ADD.replace('+', '-'), CALLS, WRONG),
    (READ_ADD.replace('+', '-'), SUMS, WRONG),
    ('def sub(a, b):\n  return a - b', TESTS, WRONG), (fenced('raise SystemExit(0)'), TESTS, WRONG),
    (fenced('import os\nos._exit(0)'), TESTS, WRONG), (fenced(f'{ADD}\nprint("passed")\nexit()'), TESTS, WRONG),
    (fenced('import os\nos.write(3, b"x" * 32)\nos._exit(0)'), TESTS, WRONG), ('print(input())', SUMS, WRONG),
    (fenced('def add(a, b:'), TESTS, UNPARSABLE_ANSWER), (fenced('print('), SUMS, UNPARSABLE_ANSWER),
    ('I cannot write it.', TESTS, UNPARSABLE_ANSWER), ('<think>' + fenced(ADD)[18:], TESTS, UNPARSABLE_ANSWER),
    (fenced(ADD), 'no tests', UNPARSABLE_REFERENCE), (fenced(ADD), '{"tests": []}', UNPARSABLE_REFERENCE),
    (fenced(ADD), '{"inputs": ["1"], "outputs": []}', UNPARSABLE_REFERENCE), (fenced(ADD), '[1]', UNPARSABLE_REFERENCE),
    (fenced('import ctypes\nctypes.string_at(0)'), TESTS, CRASH),
    # Values cross to the tests and objects stay: generators, changes in place, classes, a builtin's name.
    ('def f(n):\n  for i in range(n): yield i',
     '["assert list(f(3)) == [0, 1, 2]", "assert next(f(10**9)) == 0"]', CORRECT),
    ('def f(a): a.sort()', '["x = [3, 1]\\nf(x)\\nassert x == [1, 3]"]', CORRECT),
    ('class Pair:\n  def __init__(self, a): self.a = a\ndef f(pairs): return max(p.a for p in pairs)',
     '["p = Pair(1)\\np.a = 7\\nassert f([p, Pair(2)]) == 7"]', CORRECT),
    ('def f(g, x): return g(x)', '["assert f(lambda x: x + 1, 1) == 2", "assert f(abs, -1) == 1"]', CORRECT),
    ('def f(x):\n  raise KeyError(x)',
     '["try:\\n  f(1)\\n  assert False\\nexcept KeyError:\\n  pass"]', CORRECT),
    ('def sum(a, b): return a * b', '["assert sum(3, 4) == 12"]', CORRECT),
    ('class Solution:\n  def add(self, a, b): return a + b', CALLS, CORRECT),
    (f'```bash\npython a.py\n```\nwhich is\n```python\n{ADD}\n```\nand prints\n```\n3\n```', TESTS, CORRECT),
]  # fmt: skip
CHEATS = [  # what would pass if the tests ran where the program does
    ('class E:\n  def __eq__(self, other): return True\ndef add(a, b): return E()', TESTS, WRONG),
    ('class E(int):\n  def __eq__(self, other): return True\ndef add(a, b): return E()', TESTS, WRONG),
    ('import sys, os\nfor line in sys.stdin.read().split():\n  os.write(3, line.encode())\nos._exit(0)', TESTS, WRONG),
    ('import math\nmath.isclose = lambda *_: True\ndef f(x): return 0', '["assert math.isclose(f(1), 2)"]', WRONG),
    ('def set(x): return 0\ndef f(x): return 1', '["assert set(f(1)) == set([2])"]', WRONG),
    ('import __main__\n__main__.run_tests = __main__.run_apart = lambda *_: None', TESTS, WRONG),
]  # fmt: skip


def mistaken(graders, cases) -> list:
  """Cases that get another verdict than theirs."""
  grades = graders.grade([pool.Item('code', response, reference) for response, reference, _ in cases])
  return [(*case, g.verdict) for case, g in zip(cases, grades, strict=True) if case[2] != g.verdict]


def test_programs_are_told_apart(graders):
  assert mistaken(graders, CASES) == []


def test_a_program_does_not_grade_itself(graders):
  if sandbox.level() != 'namespaces':
    pytest.skip('this machine refuses namespaces: see the docstring of `harness` on what is not held there')
  assert mistaken(graders, CHEATS) == []


def test_a_program_that_runs_out_of_time_costs_its_limit_and_no_worker():
  with pool.RewardPool(workers=1, timeout_s=2.0) as graders:
    graders.grade([pool.Item('code', ADD, TESTS)])
    child = graders._team[0].child
    for program in ('while True: pass', 'import time\ntime.sleep(60)',
                    'print("x" * 10**6, flush=True)\nwhile True: pass'):
      grade, = graders.grade([pool.Item('code', fenced(program), TESTS)])
      assert grade.verdict == TIMEOUT and 1.0 < grade.seconds < 3.0
    assert graders._team[0].child == child


def test_references_of_programs_are_checked_without_running_anything():
  for reference in (TESTS, CALLS, SUMS, 'assert f() == 1', '["assert f() == 1"]'):
    assert functions.check_reference('code', reference) is None
  assert 'no tests' in functions.check_reference('code', 'f() == 1')


# Hostile programs, and the world afterwards.


class World:
  """What the programs would like to reach: files, a listening socket, secrets, this process."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder / 'precious'
    self.folder.mkdir()
    self.canary = self.folder / 'canary'
    self.canary.write_text('alive')
    self.canary.chmod(0o666)
    self.folder.chmod(0o777)
    (folder / 'secrets').write_text('SECRET=hunter2')
    self.server = socket.create_server(('127.0.0.1', 0))
    self.unix = socket.socket(socket.AF_UNIX)
    self.unix.bind(str(folder / 'unix'))
    os.chmod(folder / 'unix', 0o777)
    self.abstract = socket.socket(socket.AF_UNIX)
    self.abstract.bind(f'\0moe_rl_{os.getpid()}')
    self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    self.udp.bind(self.server.getsockname())
    for listener in (self.server, self.unix, self.abstract):
      listener.listen()
    for listener in (self.server, self.unix, self.abstract, self.udp):
      listener.setblocking(False)
    self.header = (f'CANARY, FOLDER = {str(self.canary)!r}, {str(self.folder)!r}\n'
                   f'SECRETS, UNIX = {str(folder / "secrets")!r}, {str(folder / "unix")!r}\n'
                   f'PORT, ABSTRACT = {self.server.getsockname()[1]}, "moe_rl_{os.getpid()}"\n'
                   f'PARENT = {os.getpid()}\nimport os as _os\n'
                   'def leak(text):\n  _os.write(1, text.encode())\n')  # fmt: skip

  def harm(self) -> list[str]:
    """What has changed."""
    out = []
    if sorted(p.name for p in self.folder.iterdir()) != ['canary'] or self.canary.read_text() != 'alive':
      out.append('files')
    if self.canary.stat().st_mode & 0o777 != 0o666:
      out.append('mode')
    for name in ('server', 'unix', 'abstract', 'udp'):
      try:
        getattr(self, name).recv(10) if name == 'udp' else getattr(self, name).accept()
        out.append(name)
      except BlockingIOError:
        pass
    return out

  def close(self):
    for name in ('server', 'unix', 'abstract', 'udp'):
      getattr(self, name).close()


@pytest.fixture
def world(tmp_path, monkeypatch):
  monkeypatch.setenv('SECRET', 'hunter2')
  for folder in (tmp_path, *tmp_path.parents[:-1]):  # else a program would be stopped by a folder's mode alone
    if folder.owner() == pathlib.Path('/proc/self').owner() and folder != pathlib.Path('/tmp'):
      folder.chmod(folder.stat().st_mode | 0o005)
  made = World(tmp_path)
  yield made
  made.close()


def processes() -> set[str]:
  """Ids of the processes that are in this process's sight and are not its own or the system's."""
  return {p for p in os.listdir('/proc') if p.isdigit() and user_of(p) >= sandbox._FIRST_USER}


def user_of(pid: str) -> int:
  try:
    return os.stat(f'/proc/{pid}').st_uid
  except OSError:
    return -1


def test_a_hundred_hostile_programs_are_contained(world):
  programs = hostile_programs.programs()
  assert len(programs) == 100 and len({family for family, _ in programs}) == 9
  free = shutil.disk_usage('/tmp').free
  items = [pool.Item('code', fenced(world.header + program), TESTS) for _, program in programs]
  neighbours = [pool.Item('code', fenced(ADD), TESTS)] * 20
  with pool.RewardPool(workers=2, timeout_s=1.2) as graders:
    pids = {member.process.pid for member in graders._team}
    graders.grade(neighbours[:2])
    templates = [member.process.pid for member in graders._team]
    grades = graders.grade([item for pair in zip(items, neighbours * 5, strict=True) for item in pair])
    assert [member.process.pid for member in graders._team] == templates and not pids  # no worker was lost
  assert [program for (_, program), g in zip(programs, grades[::2], strict=True) if g.verdict == CORRECT] == []
  # The neighbours' 100 programs all pass, but for those that a bomb beside them keeps from the processor too long.
  assert sum(g.verdict == CORRECT for g in grades[1::2]) >= 90
  assert {g.verdict for g in grades[1::2]} <= {CORRECT, TIMEOUT}
  assert max(g.seconds for g in grades) < 2.2
  assert world.harm() == []
  deadline = time.monotonic() + 5
  while processes() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert processes() == set()
  assert shutil.disk_usage('/tmp').free > free - 2**28  # a quarter of what each of eleven programs tried to write


@pytest.mark.parametrize('level', ['namespaces', 'filter'])
def test_each_way_of_containing_programs_holds_by_itself(world, level, monkeypatch):
  if sandbox.level() == 'filter' and level == 'namespaces':
    pytest.skip('this machine refuses namespaces')
  families = ('delete', 'socket', 'gigabyte', 'kill', 'escape')  # the filter alone does not promise the others
  programs = [program for family in families for program in hostile_programs.FAMILIES[family][:4]]
  for program in programs:
    outcome = sandbox._run(world.header + program, b'', sandbox.Limits(wall_s=1.5), level)
    assert outcome.status != sandbox._NO_SETUP
    assert world.harm() == [], program
  assert threading.active_count() >= 1  # this process is there


@pytest.mark.parametrize('program', hostile_programs.FAMILIES['environment'])
def test_no_environment_and_no_secret_is_read(world, program):
  if sandbox.level() != 'namespaces':
    pytest.skip('this machine refuses namespaces: see the docstring of the sandbox on what is not held there')
  outcome = sandbox.run(world.header + program, b'', sandbox.Limits(wall_s=5.0))
  assert b'hunter2' not in outcome.output + outcome.errors.replace(b'SECRETS', b'')
  assert b'SECRET' not in outcome.output


def test_what_a_program_may_do(world):
  source = ('import os, tempfile, threading, json, collections\n'
            'with tempfile.TemporaryDirectory() as d: open(d + "/x", "w").write("y")\n'
            't = threading.Thread(target=print, args=("thread",)); t.start(); t.join()\n'
            'print(os.getcwd(), sorted(os.environ)[0], input())')  # fmt: skip
  outcome = sandbox.run(source, b'line\n', sandbox.Limits(wall_s=10.0))
  if sandbox.level() == 'namespaces':
    assert outcome.output == b'thread\n/tmp HOME line\n' and outcome.status == 0
  assert sandbox.run('import sys; sys.exit(5)', b'', sandbox.Limits()).status == 5
  assert sandbox.run('import os; os.write(3, b"r")', b'', sandbox.Limits()).report == b'r'
  assert len(sandbox.run('print("x" * 10**7)', b'', sandbox.Limits()).output) == 2**20
  assert sandbox.run('import os; os.abort()', b'', sandbox.Limits()).status < 0


# The public programs.


@pytest.mark.data
def test_solutions_of_mbpp_pass_their_tests_and_not_those_of_others(graders, shared_data):
  records = json.loads((shared_data / 'code' / 'mbpp_sanitized.json').read_text())[::8]
  references = [json.dumps({'tests': json.loads(r['test_list']) if isinstance(r['test_list'], str) else r['test_list'],
                            'setup': '\n'.join(r['test_imports'])}) for r in records]  # fmt: skip
  programs = [fenced(r['code']) for r in records]
  grades = graders.grade([pool.Item('code', p, r) for p, r in zip(programs, references, strict=True)])
  # Task 123 runs for over 20 s on slow machines.
  failed = {r['task_id'] for r, g in zip(records, grades, strict=True) if g.verdict != CORRECT}
  assert failed <= {123}
  others = graders.grade([pool.Item('code', p, r) for p, r in zip(programs[:20], references[1:21], strict=True)])
  assert {g.verdict for g in others} == {WRONG}


def test_a_program_is_found_where_a_model_writes_it():
  assert code.find_program('```python\na = 1\n```\nor rather\n```py\nb = 2\n```') == 'b = 2\n'
  assert code.find_program('```python\na = 1') == 'a = 1'  # the last fence left out
  assert code.find_program('no program here') is None
  assert code.find_program('x' * 200_000) is None
  assert sys.platform == 'linux' or sandbox.level() == 'none'
