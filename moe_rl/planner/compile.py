"""Compiles programs for a slice in a child process, watches it, and reads what it leaves.

The compiler may take minutes and gigabytes and may abort its process: none of this may happen to the caller. A
program's HLO and buffers are read from the compiler's dump, which is written before code is generated. That last part
can take many minutes and is cut off after `patience` seconds: it adds the code's own bytes and the compiler's estimate,
and it alone finds out whether a kernel's blocks fit the vector memory, so a plan that was cut off does not vouch for
that.
"""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

from moe_rl.planner.topologies import GIB, Topology, require_libtpu

HOST_MEMORY = 5  # its number in the compiler's dump


@dataclasses.dataclass(frozen=True)
class Compiled:
  """One program. memory: bytes a device by kind ('arguments', 'outputs', 'aliased', 'temporaries', 'code', 'host'),
  empty if it could not be compiled; resident: bytes of the run's state that lie in HBM beside it; hlo: its text, ''
  if there is none; error: why not; needed: HBM that it takes, where the compiler says so as it refuses; compiler: its
  own estimate (flops, bytes accessed, optimal_seconds: loops counted once); seconds: it took; cut: code was not
  generated."""

  name: str
  memory: dict[str, float]
  resident: float
  hlo: str
  error: str = ''
  needed: float = 0.0
  compiler: dict = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  cut: bool = False

  @property
  def peak(self) -> float:
    """HBM bytes a device while it runs, the rest of the run's state included."""
    m = self.memory
    if not m:
      return self.needed + self.resident if self.needed else 0.0
    return m['arguments'] + m['outputs'] - m['aliased'] + m['temporaries'] + m['code'] + self.resident


@dataclasses.dataclass(frozen=True)
class Compilation:
  """places: where the mesh's devices sit, in its order (`topologies.place`)."""

  programs: list[Compiled]
  places: list[tuple[int, ...]]
  notes: tuple[str, ...]


def compile_all(topology: Topology, factory: str, arguments: dict, *, only=(), patience: float = 300.0,
                progress=None) -> Compilation:
  """Compiles what `factory`, as 'module:function', makes: function(topology, **arguments) -> `programs.Made`.

  arguments: JSON; only: names of programs, all if empty; progress: called with (what, seconds so far), often. Raises
  ValueError if the programs cannot be made or libtpu is absent; what one program does to its process is in its result.
  """
  require_libtpu()
  with tempfile.TemporaryDirectory(prefix='moe_rl_plan_') as folder:
    watch = Watch(pathlib.Path(folder), patience, progress or (lambda what, seconds: None))
    request = dict(topology=topology.name, factory=factory, arguments=arguments, only=list(only),
                   events=str(watch.events), dump=str(watch.dump))
    while (first := watch.next_program(only)) is not None:
      watch.run(request | {'first': first})
    return watch.compilation()


class Watch:
  """The children of one compilation, in turn: a child that dies costs its program, and another goes on after it."""

  def __init__(self, folder: pathlib.Path, patience: float, progress):
    self.folder, self.patience, self.progress = folder, patience, progress
    self.events, self.dump, self.log = folder / 'events.jsonl', folder / 'dump', folder / 'log'
    self.events.touch()
    self.started, self.made, self.done = time.time(), None, {}

  def next_program(self, only) -> int | None:
    """The first that has no result; 0 before it is known what there is."""
    if self.made is None:
      return 0
    return next((n for n, name in enumerate(self.made['programs'])
                 if n not in self.done and (not only or name in only)), None)

  def run(self, request: dict):
    """One child, to its end or its program's."""
    path = self.folder / 'request.json'
    path.write_text(json.dumps(request))
    seen = len(self.read())
    environment = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3', 'TPU_STDERR_LOG_LEVEL': '3', 'PYTHONPATH': os.pathsep.join(
      p for p in (os.getcwd(), *sys.path) if p)}
    environment.pop('XLA_FLAGS', None)  # they are for this machine's own devices
    with self.log.open('wb') as log:
      child = subprocess.Popen([sys.executable, '-m', 'moe_rl.planner.child', str(path)], env=environment, stdout=log,
                               stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
      current = self._follow(child, seen)
    finally:
      if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
      child.wait()
    self._account(self.read()[seen:], current, child.returncode)

  def _follow(self, child, seen: int) -> dict | None:
    """Waits. Returns what the child was at when its patience ran out, None if it ended by itself."""
    while True:
      ended = child.poll() is not None
      news = self.read()[seen:]
      current = at_work(news)
      name = self._name(current, news)
      self.progress(name, time.time() - self.started)
      if ended:
        return None
      if current and (written := self._written(current['program'])) and time.time() - written > self.patience:
        return current
      time.sleep(0.2)

  def _name(self, current, news) -> str:
    made = next((e for e in news if e['event'] == 'made'), self.made)
    if not made:
      return 'making the programs'
    return made['programs'][current['program']] if current else 'programs'

  def _account(self, news: list[dict], cut: dict | None, status: int):
    """Keeps what a child has said, and what it did not live to say."""
    for event in news:
      if event['event'] == 'refused':
        raise ValueError(event['why'])
      if event['event'] == 'made':
        self.made = event
      if event['event'] == 'done':
        self.done[event['program']] = event
    tail = '\n'.join(self.log.read_text(errors='replace').splitlines()[-15:])
    if self.made is None:
      raise ValueError(f'the process that makes the programs ended with status {status}. Its last words:\n{tail}')
    current = at_work(news)
    if current is not None:
      n = current['program']
      if cut:
        self.done[n] = current | {'memory': read_buffers(self.buffers(n).read_text()), 'cut': True,
          'seconds': self.patience}
      else:
        self.done[n] = current | {'error': f'the compiler ended with status {status}: {tail}', 'seconds': 0.0}

  def read(self) -> list[dict]:
    lines = self.events.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith('\n')]

  def compilation(self) -> Compilation:
    out = []
    for n in sorted(self.done):
      d, hlo = self.done[n], self.hlo_file(n)
      error = d.get('error', '')
      out.append(Compiled(
        self.made['programs'][n], d.get('memory', {}), d['resident'], hlo.read_text() if hlo else '', error,
        needed_bytes(error), d.get('compiler', {}), d['seconds'], d.get('cut', False)))
    return Compilation(out, [tuple(p) for p in self.made['places']], tuple(self.made['notes']))

  def hlo_file(self, program: int) -> pathlib.Path | None:
    """The optimised program in the dump. Helpers that were compiled beside it are smaller."""
    return self._largest(program, '*after_optimizations.txt') or self._largest(
      program, '*after_optimizations_before_buffer_assignment.txt')

  def buffers(self, program: int) -> pathlib.Path | None:
    return self._largest(program, '*after_optimizations-buffer-assignment.txt')

  def _written(self, program: int) -> float | None:
    """When its HLO and buffers were in the dump, as a Unix time; None before. The compiler writes the HLO once more
    after the buffers, so that those are whole by then."""
    last = self._largest(program, '*after_optimizations_after_buffer_assignment.txt')
    return last.stat().st_mtime if last and self.hlo_file(program) and self.buffers(program) else None

  def _largest(self, program: int, pattern: str) -> pathlib.Path | None:
    files = list((self.dump / str(program)).glob(pattern))
    return max(files, key=lambda f: f.stat().st_size, default=None)


def at_work(events: list[dict]) -> dict | None:
  """The program begun and not done."""
  done = {e['program'] for e in events if e['event'] == 'done'}
  return next((e for e in events if e['event'] == 'begun' and e['program'] not in done), None)


def needed_bytes(error: str) -> float:
  """HBM that the compiler says a program takes, where it refuses one that does not fit."""
  found = re.search(r'(?:total memory required[^(]*\(|Used )([\d.]+)([KMGT]?)', error)
  return float(found.group(1)) * {'': 1, 'K': 2**10, 'M': 2**20, 'G': GIB, 'T': 2**40}[found.group(2)] if found else 0.0


def read_buffers(text: str) -> dict[str, float]:
  """Memory by kind from the compiler's buffer assignment, for programs whose code was not generated (it is counted as
  0)."""
  memory = dict.fromkeys(('arguments', 'outputs', 'aliased', 'temporaries', 'code', 'host'), 0.0)
  for line in text.splitlines():
    found = re.match(r'allocation \d+: size (\d+),(.*)', line)
    if not found:
      continue
    size, rest = float(found.group(1)), found.group(2)
    if re.search(rf'color {HOST_MEMORY}\b', rest) and 'thread-local' not in rest:
      memory['host'] += size
    if re.search(r'color [1-9]|thread-local', rest):  # other memories; views into callers' own
      continue
    parameter, out = re.search(r'\bparameter \d', rest), 'live-out' in rest or 'output shape' in rest
    memory['arguments'] += size * bool(parameter)
    memory['outputs'] += size * out
    memory['aliased'] += size * bool(parameter and out)
    memory['temporaries'] += size * (not parameter and not out)
  return memory
