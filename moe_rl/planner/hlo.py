"""Optimised HLO as text, read: computations, shapes, device groups, and how often each loop goes round."""

import dataclasses
import functools
import math
import re

BITS = {'pred': 8, 'token': 0, 'opaque': 0, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 'f4e2m1fn': 4, 'bf16': 16, 'c64': 64,
        'c128': 128}


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array. memory: 0 is HBM, 1 on-chip VMEM, 5 the host's; others hold scalars and flags."""

  dtype: str
  dims: tuple[int, ...]
  memory: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """Without the padding of tiles."""
    return self.size * bits(self.dtype) / 8


def bits(dtype: str) -> int:
  if dtype in BITS:
    return BITS[dtype]
  digits = re.match(r'[a-z]+(\d+)', dtype)
  return int(digits.group(1)) if digits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
  """shapes: the result's arrays, a tuple's in order; type: the result's, as it is written."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  literal: str = ''
  type: str = ''

  def called(self, key: str) -> str | None:
    """The computation that an attribute such as `calls` names."""
    found = re.search(rf'\b{key}=%?([\w.\-]+)', self.attributes)
    return found.group(1) if found else None

  @property
  def index(self) -> int:
    """Of get-tuple-element, parameter."""
    return int(re.search(r'index=(\d+)', self.attributes).group(1)) if self.opcode != 'parameter' else int(self.literal)

  @property
  def source(self) -> str:
    """What it came from in the program that was traced: `jit(update)/while/body/dot_general`."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found.group(1) if found else self.name


@dataclasses.dataclass(frozen=True)
class Computation:
  name: str
  instructions: dict[str, Instruction]
  root: Instruction

  @functools.cached_property
  def parameters(self) -> dict[int, str]:
    return {i.index: i.name for i in self.instructions.values() if i.opcode == 'parameter'}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    out = {}
    for i in self.instructions.values():
      for name in dict.fromkeys(i.operands):
        out.setdefault(name, []).append(i)
    return out

  def operand(self, instruction: Instruction, n: int) -> Instruction | None:
    return self.instructions.get(instruction.operands[n]) if n < len(instruction.operands) else None


@dataclasses.dataclass(frozen=True)
class Module:
  """devices: that one run of the program is spread over."""

  computations: dict[str, Computation]
  entry: Computation
  devices: int


HEADER = re.compile(r'^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->.*\{\s*$')
END = re.compile(r'^\}(, execution_thread="\w+")?\s*$')
LINE = re.compile(r'^\s*(ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$')
ARRAY = re.compile(r'(\w+)\[([\d,<=]*)\](\{[^}]*\})?')


def parse(text: str) -> Module:
  """A module's text, as `compiled.as_text()` or the compiler's dump has it. Raises ValueError if there is none.

  An operand `%loop#1`, as jaxlib 0.12 writes an element of a tuple, becomes an instruction get-tuple-element as before.
  """
  computations, entry, current, root = {}, None, None, None
  for line in logical_lines(text):
    if current is None:
      header = HEADER.match(line)
      if header:
        current, root = (header.group(2), {}, bool(header.group(1))), None
    elif END.match(line):
      name, instructions, is_entry = current
      computation = Computation(name, instructions, root or list(instructions.values())[-1])
      computations[name] = computation
      entry, current = (computation if is_entry else entry), None
    elif found := LINE.match(line):
      instruction = parse_instruction(found.group(2), found.group(3))
      for operand in instruction.operands:
        name_elements(operand, current[1])
      current[1][instruction.name] = instruction
      root = instruction if found.group(1) else root
  if entry is None:
    raise ValueError('this is no HLO module: it has no ENTRY computation')
  head = text[:text.find('\n')]
  counts = (re.search(rf'{key}=(\d+)', head) for key in ('num_partitions', 'replica_count'))
  return Module(computations, entry, math.prod(int(c.group(1)) for c in counts if c))


def logical_lines(text: str):
  """Lines of a module, an instruction each: what a kernel carries may have line breaks of its own, which go on at the
  margin."""
  held = ''
  for line in text.splitlines():
    if held.startswith(' ') and line and not line[0].isspace() and not END.match(line):
      held += line
    else:
      if held:
        yield held
      held = line
  yield held


def parse_instruction(name: str, text: str) -> Instruction:
  text = re.sub(r'/\*.*?\*/', '', text)
  end = closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
  shapes, rest = text[:end], text[end:].lstrip()
  opening = rest.index('(')
  close = closing(rest, opening)
  opcode, inside = rest[:opening], rest[opening + 1:close]
  literal = inside if opcode in ('constant', 'parameter') else ''
  operands = () if literal else tuple(p.split()[-1].lstrip('%') for p in split(inside) if p.strip())
  return Instruction(name, opcode, parse_shapes(shapes), operands, rest[close + 1:], literal, shapes)


def name_elements(operand: str, instructions: dict[str, Instruction]):
  """Adds the element of a tuple that `operand` is, unless it is an instruction's name."""
  source, mark, index = operand.rpartition('#')
  if not mark or operand in instructions:
    return
  name_elements(source, instructions)
  if source in instructions:
    own = split(instructions[source].type[1:-1])[int(index)].strip()
    instructions[operand] = Instruction(
      operand, 'get-tuple-element', parse_shapes(own), (source,), f'index={index}', type=own)


def parse_shapes(text: str) -> tuple[Shape, ...]:
  out = []
  for dtype, dims, layout in ARRAY.findall(text):
    space = re.search(r'S\((\d+)\)', layout)
    sizes = tuple(int(d.lstrip('<=')) for d in dims.split(',') if d)
    out.append(Shape(dtype, sizes, int(space.group(1)) if space else 0))
  return tuple(out)


def closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes; quoted text has no brackets."""
  depth, quoted = 0, False
  for i in range(start, len(text)):
    c = text[i]
    if c == '"':
      quoted = not quoted
    elif quoted:
      continue
    elif c in '([{':
      depth += 1
    elif c in ')]}':
      depth -= 1
      if not depth:
        return i
  raise ValueError(f'HLO: a bracket is not closed in {text[start:start + 80]}')


def split(text: str) -> list[str]:
  """At commas outside brackets."""
  out, depth, start = [], 0, 0
  for i, c in enumerate(text):
    depth += (c in '([{') - (c in ')]}')
    if c == ',' and not depth:
      out.append(text[start:i])
      start = i + 1
  return [*out, text[start:]]


# Groups of devices that a collective runs within.

@functools.lru_cache(maxsize=4096)
def groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """Device numbers (places in the mesh, flattened) by group, from `replica_groups=` in its explicit form
  `{{0,1},{2,3}}`, as a reshaped and transposed count `[2,4]<=[4,2]T(1,0)`, or by mesh axes
  `mesh['a'=2,'b'=4] {'b'}`. None given: all devices are one group."""
  import numpy as np
  found = re.search(r'replica_groups=(.*)', attributes)
  text = found.group(1) if found else ''
  if counted := re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    return rows(iota(*counted.groups()))
  if text.startswith('mesh['):
    return _mesh_groups(text)
  if text.startswith('{{'):
    inside = text[1:closing(text, 0)]
    return tuple(tuple(int(d) for d in g.split(',')) for g in re.findall(r'\{([\d,]+)\}', inside))
  return rows(np.arange(devices)[None])


def iota(shape: str, base: str, transposed: str | None):
  import numpy as np
  numbers = [tuple(int(x) for x in t.split(',')) for t in (shape, base)]
  ids = np.arange(math.prod(numbers[1])).reshape(numbers[1])
  if transposed:
    ids = ids.transpose([int(x) for x in transposed.split(',')])
  return ids.reshape(numbers[0])


def rows(ids) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(int(d) for d in row) for row in ids.reshape(-1, ids.shape[-1]))


def _mesh_groups(text: str) -> tuple[tuple[int, ...], ...]:
  """A mesh's axes by name; an axis may be a part of one: `'a':(2)4` is the factor of 4 that has 2 before it."""
  import numpy as np
  close = closing(text, text.index('['))
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", text[:close])}
  order = re.search(r'device_ids=\(?\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?', text)
  total = math.prod(sizes.values())
  ids = np.arange(total)
  if order and order.group(2):
    ids = iota(*order.groups()).reshape(-1)
  elif order:
    ids = np.array([int(x) for x in order.group(1).split(',')])
  listed = re.search(r'\{([^}]*)\}', text[close:])
  wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", listed.group(1) if listed else '')
  shape, taken = [], []
  for name, size in sizes.items():
    part = next(((int(pre or 1), int(n or size)) for axis, pre, n in wanted if axis == name), None)
    if part is None:
      shape.append(size)
    else:
      taken.append(len(shape) + 1)
      shape += [part[0], part[1], size // part[0] // part[1]]
  ids = ids.reshape(shape)
  others = [d for d in range(ids.ndim) if d not in taken]
  return rows(ids.transpose([*others, *taken]).reshape(-1, math.prod(ids.shape[d] for d in taken)))


# How often loops go round.

@dataclasses.dataclass(frozen=True)
class Trips:
  """count: rounds; certain: 'known', 'at most' (the loop may end sooner), or 'unknown' (count is 1)."""

  count: int
  certain: str


@dataclasses.dataclass(frozen=True)
class Linear:
  """element of the loop's state + offset; a plain number where element is None."""

  element: int | None
  offset: int


class Scope:
  """A computation with what is known of its parameters: `state` maps elements of a loop's tuple to numbers, `values`
  maps parameters to Linear."""

  def __init__(self, module: Module, computation: Computation, state=None, values=None):
    self.module, self.computation, self.state, self.values = module, computation, state or {}, values or {}

  def linear(self, name: str) -> Linear | None:
    """What an integer scalar is, as far as copies, sums and fusions of them go."""
    i = self.computation.instructions.get(name)
    if i is None:
      return None
    if i.opcode == 'constant':
      return Linear(None, int(i.literal)) if re.fullmatch(r'-?\d+', i.literal) else None
    if i.opcode == 'parameter':
      return self.values.get(i.index)
    if i.opcode in ('copy', 'bitcast', 'convert', 'reshape', 'copy-start', 'copy-done', 'opt-barrier'):
      return self.linear(i.operands[0])
    if i.opcode == 'get-tuple-element':
      return self._element(i)
    if i.opcode in ('add', 'subtract'):
      return self._sum(i)
    if i.opcode == 'fusion':
      called = self.module.computations[i.called('calls')]
      values = {n: self.linear(o) for n, o in enumerate(i.operands)}
      return Scope(self.module, called, values=values).linear(called.root.name)
    return None

  def _element(self, i: Instruction) -> Linear | None:
    source = self.computation.instructions[i.operands[0]]
    if source.opcode == 'tuple':
      return self.linear(source.operands[i.index])
    if source.opcode == 'parameter':
      return Linear(None, self.state[i.index]) if i.index in self.state else Linear(i.index, 0)
    return None

  def _sum(self, i: Instruction) -> Linear | None:
    a, b = (self.linear(o) for o in i.operands)
    if a is None or b is None or b.element is not None and (i.opcode == 'subtract' or a.element is not None):
      return None
    sign = -1 if i.opcode == 'subtract' else 1
    return Linear(a.element if a.element is not None else b.element, a.offset + sign * b.offset)


def enter(scope: Scope, loop: Instruction) -> tuple[Trips, Scope]:
  """How often a `while` goes round, and its body's scope."""
  module = scope.module
  body, condition = (module.computations[loop.called(key)] for key in ('body', 'condition'))
  start = scope.computation.instructions.get(loop.operands[0])
  first = {n: scope.linear(o) for n, o in enumerate(start.operands)} if start and start.opcode == 'tuple' else {}
  first = {n: x.offset for n, x in first.items() if x and x.element is None}
  plain, after = Scope(module, body), {}
  if body.root.opcode == 'tuple':
    after = {n: plain.linear(o) for n, o in enumerate(body.root.operands)}
  fixed = {n: x for n, x in first.items() if after.get(n) == Linear(n, 0)}
  inside = Scope(module, body, fixed)
  if told := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
    return Trips(int(told.group(1)), 'known'), inside
  if body.root.opcode == 'tuple':  # again, as a step may be one of the fixed elements
    after = {n: inside.linear(o) for n, o in enumerate(body.root.operands)}
  counts, whole = _ends(Scope(module, condition, fixed), condition.root.name, first, after)
  if not counts:
    return Trips(1, 'unknown'), inside
  return Trips(min(counts), 'known' if whole else 'at most'), inside


def _ends(scope: Scope, name: str, first: dict, after: dict) -> tuple[list[int], bool]:
  """(rounds after which each understood part of a condition ends the loop, whether all parts are understood)."""
  i = scope.computation.instructions[name]
  if i.opcode == 'fusion':
    called = scope.module.computations[i.called('calls')]
    values = {n: scope.linear(o) for n, o in enumerate(i.operands)}
    return _ends(Scope(scope.module, called, values=values), called.root.name, first, after)
  if i.opcode in ('copy', 'bitcast', 'reshape'):
    return _ends(scope, i.operands[0], first, after)
  if i.opcode == 'and':
    parts = [_ends(scope, o, first, after) for o in i.operands]
    return sum((counts for counts, _ in parts), []), all(whole for _, whole in parts)
  if i.opcode == 'compare':
    count = _compared(i, *(scope.linear(o) for o in i.operands), first, after)
    return ([], False) if count is None else ([count], True)
  return [], False


def _compared(i: Instruction, a: Linear | None, b: Linear | None, first: dict, after: dict) -> int | None:
  direction = re.search(r'direction=(\w+)', i.attributes).group(1)
  if a and b and a.element is None and b.element is not None:
    a, b, direction = b, a, {'LT': 'GT', 'GT': 'LT', 'LE': 'GE', 'GE': 'LE'}.get(direction, direction)
  if not (a and b) or a.element is None or b.element is not None or a.element not in first:
    return None
  step = after.get(a.element)
  if step is None or step.element != a.element or not step.offset:
    return None
  room = b.offset - (first[a.element] + a.offset)
  if direction in ('LE', 'GE'):
    room += 1 if direction == 'LE' else -1
  if direction == 'EQ' or direction == 'NE' and room % step.offset:
    return None
  return max(0, -(-room // step.offset)) if step.offset > 0 else max(0, -(room // -step.offset) if room < 0 else 0)
