"""Runs in `sandbox`, as `python -c`: a program in one process, its tests in another, which asks the first for values.

Standard input: the program's length in bytes and a line break, the program, then two lines of JSON: the job (setup,
tests, function, see `code`) and a token. The token is written to descriptor 3 when all tests have passed.

The program's process is forked before the tests are read, and holds neither their descriptors nor their memory. What it
answers is plain data, or a handle to an object that stays with it; so what counts is compared by an interpreter that
the program has never touched: no equality that is always true, no patched builtin or module, no exit and no look at the
tests makes a wrong program right. Where that cannot be (no second process is allowed, or a test hands over a function
of its own) the tests run in the program's interpreter, which is weaker.
"""

import builtins
import collections
import json
import os
import signal
import sys
import time

NOT_PYTHON = 90  # exit status for a syntax error
_EXACT = {list: 'list', tuple: 'tuple', set: 'set', frozenset: 'frozenset', collections.deque: 'deque'}
_MAKE = {name: kind for kind, name in _EXACT.items()}
_PLAIN = (type(None), bool, int, float, str)


class Unsendable(Exception):
  """A test hands the program what only its own process can have."""


def encode(value, other):
  """As JSON: plain values and their containers; all else by `other(value)`."""
  kind = type(value)
  if kind in _PLAIN:
    return value
  if kind in _EXACT:
    return [_EXACT[kind], [encode(part, other) for part in value]]
  if isinstance(value, dict) and kind.__module__ in ('builtins', 'collections'):
    return ['dict', [[encode(key, other), encode(part, other)] for key, part in dict.items(value)]]
  if isinstance(value, tuple):  # a named one
    return ['tuple', [encode(part, other) for part in tuple.__iter__(value)]]
  for base in (int, float, str):  # as one of these, whatever else it would be
    if isinstance(value, base):
      return {int: int.__index__, float: float.__float__, str: str.__str__}[base](value)
  if kind is complex:
    return ['complex', [value.real, value.imag]]
  if kind in (bytes, bytearray):
    return ['bytes', bytes(value).hex()]
  if kind is range:
    return ['range', [value.start, value.stop, value.step]]
  return other(value)


def decode(data, other):
  """The inverse; what is none of its kinds goes to `other(kind, data)`."""
  if not isinstance(data, list):
    return data
  kind, body = data
  if kind in _MAKE:
    return _MAKE[kind](decode(part, other) for part in body)
  if kind == 'dict':
    return {decode(key, other): decode(part, other) for key, part in body}
  if kind in ('complex', 'range'):
    return {'complex': complex, 'range': range}[kind](*body)
  return bytes.fromhex(body) if kind == 'bytes' else other(kind, body)


# The program's process.


def serve(program, inbox, outbox):
  """Runs the program, then answers until the tests' process ends."""
  here, objects = {'__name__': 'solution'}, []

  def handle(value):
    objects.append(value)
    return ['handle', len(objects) - 1]

  def mine(kind, body):
    return objects[body] if kind == 'handle' else getattr(builtins, body)

  def tell(value):
    outbox.write(json.dumps(value) + '\n')
    outbox.flush()
  try:
    code = compile(program, 'solution.py', 'exec')
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    os._exit(NOT_PYTHON)
  exec(code, here)
  names = {name: value for name, value in here.items() if not name.startswith('__')}
  tell([[name, ['module', value.__name__] if type(value) is type(sys) else encode(value, handle)]
        for name, value in names.items()])
  for line in inbox:
    try:
      operation, *operands = [decode(part, mine) for part in json.loads(line)]
      result = answer(here, operation, *operands)
      tell(['is', encode(result, handle), encode(operands[1:2], handle) if operation == 'call' else None])
    except BaseException as error:
      tell(['raise', type(error).__name__, str(error)[:1000]])
  os._exit(0)


def answer(here, operation, *operands):
  if operation == 'function':  # a called one may be a method of `class Solution`
    name, = operands
    return here[name] if name in here or 'Solution' not in here else getattr(here['Solution'](), name)
  if operation == 'call':
    function, arguments, named = operands
    return function(*arguments, **named)
  return {'get': getattr, 'set': setattr, 'iter': iter, 'next': next, 'text': str, 'bool': bool}[operation](*operands)


# The tests' process.


class Peer:
  """The program's process, as the tests see it."""

  def __init__(self, child, inbox, outbox):
    self.child, self.inbox, self.outbox = child, inbox, outbox
    self.names = {name: decode(value, self.theirs) for name, value in self.hear()}

  def theirs(self, kind, body):
    if kind == 'handle':
      return Handle(self, body)
    return __import__(body) if body in sys.stdlib_module_names else None  # a module: the program's may be patched

  def hear(self):
    line = self.inbox.readline()
    if not line:  # it has ended: so does this, in the same way
      status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
      if status < 0:
        if -status != signal.SIGKILL:
          signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
      os._exit(NOT_PYTHON if status == NOT_PYTHON else 1)
    return json.loads(line)

  def ask(self, operation, *operands):
    self.outbox.write(json.dumps([encode(part, self.send) for part in (operation, *operands)]) + '\n')
    self.outbox.flush()
    kind, *said = self.hear()
    if kind == 'raise':
      error = getattr(builtins, said[0], None)
      known = isinstance(error, type) and issubclass(error, Exception)
      raise (error if known else type(said[0], (Exception,), {}))(said[1])
    if operation == 'call':  # lists and dicts that it has changed in place
      for own, theirs in zip(operands[1], decode(said[1], self.theirs)[0], strict=False):
        if type(own) is list and type(theirs) is list:
          own[:] = theirs
        elif type(own) is dict and type(theirs) is dict:
          own.clear()
          own.update(theirs)
    return decode(said[0], self.theirs)

  def send(self, value):
    if type(value) is Handle:
      return ['handle', object.__getattribute__(value, '_index')]
    name = getattr(value, '__name__', '')
    if isinstance(name, str) and getattr(builtins, name, None) is value:
      return ['builtin', name]
    raise Unsendable(repr(value))


class Handle:
  """An object of the program's. It equals nothing but itself."""

  def __init__(self, peer, index):
    object.__setattr__(self, '_peer', peer)
    object.__setattr__(self, '_index', index)

  def __getattr__(self, name):
    return self._peer.ask('get', self, name)

  def __setattr__(self, name, value):
    self._peer.ask('set', self, name, value)

  def __call__(self, *arguments, **named):
    return self._peer.ask('call', self, list(arguments), named)

  def __iter__(self):
    items = self._peer.ask('iter', self)
    while True:
      try:
        yield next(items)
      except StopIteration:
        return

  def __next__(self):
    return self._peer.ask('next', self)

  def __bool__(self):
    return self._peer.ask('bool', self)

  def __str__(self):
    return self._peer.ask('text', self)

  def __eq__(self, other):
    return type(other) is Handle and other._index == self._index

  __hash__ = object.__hash__


def _through(name):
  def ask(self, *operands):
    try:
      method = self._peer.ask('get', self, name)
    except AttributeError as error:  # Python asks some objects for a length that they need not have
      raise TypeError(str(error)) from None
    return method(*operands)
  return ask


for _name in ('__len__', '__getitem__', '__setitem__', '__contains__', '__lt__', '__le__', '__gt__', '__ge__'):
  setattr(Handle, _name, _through(_name))


def run_tests(job, here, function):
  """Raises what a test raises. here: names for tests; function(name): what is called."""
  exec(job['setup'], here)
  for test in job['tests']:
    if isinstance(test, str):
      exec(compile(test, 'test', 'exec'), here)
    else:
      arguments, wanted = test
      got = function(job['function'])(*arguments)
      assert json.loads(json.dumps(got)) == wanted


def run_apart(job, peer):
  """A program's own `sum` is used only where tests name nothing else of the program's: else it is Python's that counts,
  as in `assert set(f(1)) == {2}`."""
  own = {name: value for name, value in peer.names.items() if not hasattr(builtins, name)}
  used = {name for test in job['tests'] if isinstance(test, str) for name in compile(test, 'test', 'exec').co_names}
  names = own if used.intersection(own) else peer.names
  run_tests(job, {'__name__': 'tests', **names}, lambda name: peer.ask('function', name))


def run_together(job, program):
  here = {'__name__': 'solution'}
  try:
    code = compile(program, 'solution.py', 'exec')
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    os._exit(NOT_PYTHON)
  exec(code, here)
  run_tests(job, here, lambda name: answer(here, 'function', name))


def _read(count):
  data = b''
  while len(data) < count and (more := os.read(0, count - len(data))):
    data += more
  return data


def _line():
  """The next line, and no byte more: the other process must not have read what follows."""
  data = b''
  while (byte := os.read(0, 1)) not in (b'\n', b''):
    data += byte
  return data


def _hide():
  """No other process of this user may look into this one."""
  import ctypes
  ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)


def _fork():
  """As os.fork; None where the sandbox allows no second process. A machine that is short of processes or memory is
  asked again for two seconds, and then the tests fail: being busy is no reason for the weaker way."""
  for _ in range(200):
    try:
      return os.fork()
    except PermissionError:
      return None
    except OSError as error:
      busy = error
      time.sleep(0.01)
  raise busy


def main():
  sys.set_int_max_str_digits(0)
  program = _read(int(_line())).decode('utf-8', 'surrogatepass')
  pipes = [*os.pipe(), *os.pipe()]
  _hide()
  child = _fork()
  if child == 0:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd in (3, pipes[1], pipes[2]):
      os.close(fd)
    serve(program, os.fdopen(pipes[0]), os.fdopen(pipes[3], 'w'))
  with os.fdopen(0) as rest:
    job = json.loads(rest.readline())
    if child is None:
      run_together(job, program)
    else:
      os.close(pipes[0])
      os.close(pipes[3])
      try:
        run_apart(job, Peer(child, os.fdopen(pipes[2]), os.fdopen(pipes[1], 'w')))
      except Unsendable:
        os.kill(child, signal.SIGKILL)
        run_together(job, program)
    os.write(3, rest.readline().encode())
  os._exit(0)


if __name__ == '__main__':
  main()
