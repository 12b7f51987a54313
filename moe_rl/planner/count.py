"""What a compiled program does on one device: matrix FLOPs, HBM bytes and collectives, loops multiplied out.

The compiler's own count takes a loop's body once; here a program is a tree of loops, and each is multiplied by its
rounds. Of conditionals the dearest branch counts. FLOPs are those of matrix products, convolutions and kernels that
say theirs (a multiply-add is 2): what the matrix units do. HBM bytes are operands and results of each operation outside
fusions, as far as they lie in HBM; of a slice or gather what is taken, of an update in place what is written.
"""

import collections
import dataclasses
import math
import re
import types
from collections.abc import Mapping

from moe_rl.planner import kernels
from moe_rl.planner.hlo import Computation, Instruction, Module, Scope, Shape, Trips, enter, groups

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
               'collective-broadcast')
FREE = frozenset((
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id', 'iota',
  'opt-barrier', 'optimization-barrier', 'add-dependency', 'domain', 'while', 'conditional', 'call', 'broadcast-done'))
# Custom calls that only name memory or layouts.
FREE_CALLS = frozenset(('AllocateBuffer', 'Sharding', 'SPMDFullToShardShape', 'SPMDShardToFullShape',
  'AssumeGatherIndicesInBound'))

# In a fused computation, the same elements under another shape, and in another order or type.
RENAMED, MOVED = ('bitcast', 'reshape'), ('copy', 'transpose', 'convert')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of exchange. operand, result: bytes on a device; groups: device numbers, or (from, to) of a permute."""

  kind: str
  operand: float
  result: float
  groups: tuple[tuple[int, ...], ...]
  source: str

  @property
  def members(self) -> int:
    return max(map(len, self.groups)) if self.groups else 1

  @property
  def received(self) -> float:
    """Bytes that a device gets from others, at the least: of n devices that gather or exchange, (n-1)/n of the whole;
    all-reduce is a reduce-scatter and an all-gather. ragged-all-to-all: of its smaller buffer, as its larger one has
    room for uneven loads."""
    n = self.members
    others = (n - 1) / n
    return {
      'all-gather': self.result * others, 'reduce-scatter': self.operand * others,
      'all-reduce': 2 * self.result * others, 'all-to-all': self.operand * others,
      'ragged-all-to-all': min(self.operand, self.result) * others,
      'collective-permute': self.result, 'collective-broadcast': self.result}[self.kind]


@dataclasses.dataclass
class Work:
  """flops, hbm: of what stands outside loops; collectives: how often each comes; loops: the rest."""

  flops: float = 0.0
  hbm: float = 0.0
  collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  loops: list = dataclasses.field(default_factory=list)

  def add(self, other: 'Work', times: float = 1):
    """Another's work, `times` over; its loops must have been multiplied out, or times be 1."""
    self.flops += times * other.flops
    self.hbm += times * other.hbm
    for c, n in other.collectives.items():
      self.collectives[c] += times * n
    self.loops += other.loops

  def total(self, rounds: Mapping[str, float] = types.MappingProxyType({})) -> 'Work':
    """The same without loops, each multiplied out. rounds: of the loops whose length is data ('unknown' or 'at most'),
    by their name; those that it does not name count once, or as often as at most."""
    out = Work(self.flops, self.hbm, collections.Counter(self.collectives))
    for loop in self.loops:
      data = loop.trips.certain != 'known'
      out.add(loop.body.total(rounds), rounds.get(loop.name, loop.trips.count) if data else loop.trips.count)
    return out

  def open_loops(self) -> list['Loop']:
    """All loops whose length is data, outer ones before those inside."""
    return [found for loop in self.loops
            for found in [*([loop] if loop.trips.certain != 'known' else []), *loop.body.open_loops()]]

  @property
  def received(self) -> float:
    return sum(n * c.received for c, n in self.collectives.items())


@dataclasses.dataclass
class Loop:
  """source: its path in the program that was traced, `jit(sample)/decode/while`."""

  source: str
  trips: Trips
  body: Work

  @property
  def name(self) -> str:
    """The scope that it stands in directly, such as one of `programs.LOOPS`."""
    return ([''] + self.source.split('/'))[-2]


def count(module: Module) -> Work:
  """The whole program's work."""
  return Counting(module).computation(Scope(module, module.entry))


class Counting:
  """A walk over a module."""

  def __init__(self, module: Module):
    self.module = module

  def computation(self, scope: Scope) -> Work:
    work, seen = Work(), set()
    for i in scope.computation.instructions.values():
      if i.opcode == 'while':
        trips, inside = enter(scope, i)
        work.loops.append(Loop(i.source, trips, self.computation(inside)))
      elif i.opcode == 'conditional':
        names = re.findall(r'%?([\w.\-]+)', _braces(i.attributes, 'branch_computations')) or [
          i.called('true_computation'), i.called('false_computation')]
        branches = [self.computation(Scope(self.module, self.module.computations[n])) for n in names]
        work.add(max(branches, key=dearness))
      elif i.opcode == 'call' or i.opcode.endswith('-start') and i.called('calls'):
        called = self.module.computations[i.called('calls') or i.called('to_apply')]
        work.add(self.computation(Scope(self.module, called)))
      elif offloaded := self.module.computations.get(_braces(i.attributes, 'called_computations').lstrip('%')):
        work.add(self.computation(Scope(self.module, offloaded)))  # to the SparseCores: gathers, collectives
      else:
        self.single(scope.computation, i, work, seen)
    return work

  def single(self, computation: Computation, i: Instruction, work: Work, seen: set):
    """Adds one operation's work. seen: channels of fused collectives counted in this computation, as one that is fused
    with several others for overlap may be written in each of them. Channel 1 names none: all of shard_map have it."""
    work.flops += self.flops(computation, i)
    work.hbm += self.traffic(computation, i)
    for inner_of, c in self.collectives(computation, i):
      channel = re.search(r'channel_id=(\d+)', c.attributes)
      if inner_of is not computation and channel and channel.group(1) != '1':
        if channel.group(1) in seen:
          continue
        seen.add(channel.group(1))
      work.collectives[collective(inner_of, c, self.module.devices)] += 1

  def collectives(self, computation: Computation, i: Instruction):
    """(computation, instruction) of the collectives that an operation is or has fused into it."""
    if i.opcode.removesuffix('-start') in COLLECTIVES:
      yield computation, i
    elif i.opcode == 'fusion':
      inner = self.module.computations[i.called('calls')]
      for j in inner.instructions.values():
        yield from self.collectives(inner, j)

  def flops(self, computation: Computation, i: Instruction) -> float:
    if i.opcode == 'fusion':
      inner = self.module.computations[i.called('calls')]
      return sum(self.flops(inner, j) for j in inner.instructions.values())
    if i.opcode == 'dot':
      a = computation.operand(i, 0).shapes[0]
      return 2 * i.shapes[0].size * math.prod(a.dims[d] for d in _numbers(i, 'lhs_contracting_dims'))
    if i.opcode == 'ragged-dot':
      return 2 * computation.operand(i, 0).shapes[0].size * i.shapes[0].dims[-1]
    if i.opcode == 'convolution':
      return convolution_flops(i, *(computation.operand(i, n).shapes[0] for n in (0, 1)))
    if i.opcode == 'custom-call':
      attention = kernels.attention_flops(computation, i)
      return _told(i, 'flops') if attention is None else attention
    return 0.0

  def traffic(self, computation: Computation, i: Instruction) -> float:
    """HBM bytes that an operation outside fusions reads and writes."""
    if i.opcode in FREE or i.opcode.endswith(('-done', '-update')):
      return 0.0
    operands = [computation.instructions[o] for o in i.operands if o in computation.instructions]
    if i.opcode == 'custom-call':
      target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
      if target and target.group(1) in FREE_CALLS:
        return 0.0
    if i.opcode == 'fusion':
      return self._fusion(i, operands)
    return _traffic(i, operands)

  def _fusion(self, i: Instruction, operands: list[Instruction]) -> float:
    inner = self.module.computations[i.called('calls')]
    read = sum(min(in_hbm(o), self.read(inner, inner.parameters[n])) for n, o in enumerate(operands))
    return read + self.written(inner, inner.root, i.shapes)

  def read(self, computation: Computation, name: str) -> float:
    """Bytes that a fused computation takes of one of its parameters."""
    return self.taken(computation, name, 1.0) * sum(s.bytes for s in computation.instructions[name].shapes)

  def taken(self, computation: Computation, name: str, of_result: float, moved: bool = False) -> float:
    """The share of a value's elements that a fused computation takes, 1 at most. What is fused is computed where it is
    wanted and kept nowhere: of an array that is moved, then sliced, the slice alone is read.

    of_result: the share that is taken of the computation's result; moved: the value is no longer where it lay, so that
    an update of a part of it needs the rest too.
    """
    size = sum(s.size for s in computation.instructions[name].shapes)
    total = of_result if name == computation.root.name else 0.0
    for user in computation.users.get(name, []):
      if user.opcode in ('dynamic-slice', 'slice', 'gather') and user.operands[0] == name:
        total += sum(s.size for s in user.shapes) / max(size, 1)
      elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name and not moved:
        continue  # in place
      elif user.opcode in (*RENAMED, *MOVED):
        total += self.taken(computation, user.name, of_result, moved or user.opcode in MOVED)
      elif user.opcode == 'fusion':
        inner, of_inner = self.module.computations[user.called('calls')], self.taken(computation, user.name, of_result)
        total += sum(self.taken(inner, inner.parameters[n], of_inner, moved)
                     for n, o in enumerate(user.operands) if o == name)
      else:
        return 1.0
    return min(total, 1.0)

  def written(self, computation: Computation, root: Instruction, shapes: tuple[Shape, ...]) -> float:
    """Bytes that a fused computation writes into its results, which lie as `shapes` says."""
    if root.opcode == 'tuple' and len(root.operands) == len(shapes):
      return sum(self.written(computation, computation.instructions[o], (s,))
                 for o, s in zip(root.operands, shapes, strict=True))
    whole = sum(s.bytes for s in shapes if s.memory == 0)
    if root.opcode in RENAMED and root.operands[0] in computation.instructions:
      return self.written(computation, computation.instructions[root.operands[0]], shapes)
    if root.opcode == 'dynamic-update-slice' and whole:
      return min(whole, sum(s.bytes for s in computation.operand(root, 1).shapes))
    return whole


def in_hbm(i: Instruction) -> float:
  return sum(s.bytes for s in i.shapes if s.memory == 0)


def _traffic(i: Instruction, operands: list[Instruction]) -> float:
  """HBM bytes of an operation that is no fusion."""
  result = in_hbm(i)
  if i.opcode in ('dynamic-slice', 'slice', 'gather'):
    return result + min(in_hbm(operands[0]), sum(s.bytes for s in i.shapes)) + sum(map(in_hbm, operands[1:]))
  if i.opcode == 'dynamic-update-slice':
    return 2 * in_hbm(operands[1])
  if i.opcode == 'scatter':
    return 3 * in_hbm(operands[-1]) + in_hbm(operands[1])
  if i.opcode == 'copy-start':  # shapes: to, from, flag
    return sum(s.bytes for s in i.shapes[:2] if s.memory == 0)
  if i.opcode == 'slice-start':  # shapes: from, to, flag: as much is read as written
    to = i.shapes[1]
    return to.bytes * ((i.shapes[0].memory == 0) + (to.memory == 0))
  if i.opcode.removesuffix('-start') in COLLECTIVES:
    sent, got = ends(i, operands)
    return sum(s.bytes for s in (*sent, *got) if s.memory == 0)
  told = _told(i, 'bytes_accessed')
  return told or result + sum(map(in_hbm, operands))


def ends(i: Instruction, operands: list[Instruction]) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
  """(what a collective sends, what it gives). Its asynchronous start has both in its result, and flags after them."""
  kind = i.opcode.removesuffix('-start')
  counted = operands[:1] if kind in ('ragged-all-to-all', 'collective-permute') else operands
  sent = tuple(s for o in counted for s in o.shapes)
  if kind == 'all-reduce' or not i.opcode.endswith('-start'):
    return sent, i.shapes
  return sent, i.shapes[len(sent):2 * len(sent)]


def collective(computation: Computation, i: Instruction, devices: int) -> Collective:
  kind = i.opcode.removesuffix('-start')
  operands = [computation.instructions[o] for o in i.operands if o in computation.instructions]
  sent, got = ends(i, operands)
  if kind == 'all-reduce' and (slices := _scattered(computation, i)):
    kind, got = 'reduce-scatter', slices
  if kind == 'collective-permute':
    pairs = re.findall(r'\{(\d+),(\d+)\}', _braces(i.attributes, 'source_target_pairs'))
    among = tuple((int(a), int(b)) for a, b in pairs)
  else:
    among = groups(_groups_text(i.attributes), devices)
  return Collective(kind, sum(s.bytes for s in sent), sum(s.bytes for s in got), among, i.source)


def _scattered(computation: Computation, i: Instruction) -> tuple[Shape, ...]:
  """The slices that are all that is taken of an all-reduce, in the compiler's fused form of a reduce-scatter."""
  users, through = computation.users.get(i.name, []), ('bitcast', 'reshape', 'copy')
  while len(users) == 1 and users[0].opcode in through:
    users = computation.users.get(users[0].name, [])
  return users[0].shapes if len(users) == 1 and users[0].opcode == 'dynamic-slice' and 'reduce-scatter' in (
    computation.name + users[0].name).replace('all-reduce-scatter', 'reduce-scatter') else ()


def _groups_text(attributes: str) -> str:
  """The part of the attributes that names the groups, so that what is remembered by it stays small."""
  start = attributes.find('replica_groups=')
  if start < 0:
    return ''
  stop = re.search(r', (?:channel_id|use_global|dimensions|to_apply|frontend|metadata|backend|constrain)',
    attributes[start:])
  return attributes[start:start + stop.start()] if stop else attributes[start:]


def convolution_flops(i: Instruction, lhs: Shape, rhs: Shape) -> float:
  """2 x outputs x kernel inputs x products that fall on real data: batched products are written as convolutions that
  are dilated and padded, most of whose window is not there."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.attributes)
  left, kernel, out = labels.groups()
  batch_and_features = math.prod(i.shapes[0].dims[out.index(c)] for c in 'bf')
  products = 1
  window = re.search(r'window=\{([^}]*)\}', i.attributes)
  window = dict(p.split('=') for p in window.group(1).split()) if window else {}
  for n, c in enumerate(c for c in kernel if c.isdigit()):
    def along(key, default, n=n):
      return window[key].split('x')[n] if key in window else default
    low = int(along('pad', '0_0').split('_')[0])
    products *= overlap(
      lhs.dims[left.index(c)], rhs.dims[kernel.index(c)], i.shapes[0].dims[out.index(c)], int(along('stride', 1)), low,
      int(along('lhs_dilate', 1)), int(along('rhs_dilate', 1)))
  return 2.0 * batch_and_features * rhs.dims[kernel.index('i')] * products


def overlap(inputs: int, kernel: int, outputs: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
  """(output, kernel) positions of one dimension that meet an input."""
  import numpy as np
  if kernel == 1 and not low and dilate == 1:
    return min(outputs, -(-inputs // stride))
  at, total = np.arange(outputs) * stride - low, 0
  for k in range(kernel):
    where = at + k * kernel_dilate
    total += int(((where >= 0) & (where < (inputs - 1) * dilate + 1) & (where % dilate == 0)).sum())
  return total


def _told(i: Instruction, what: str) -> float:
  """A kernel's own estimate."""
  found = re.search(rf'"cost_estimate":\{{[^}}]*"{what}":"?(-?\d+)', i.attributes)
  return max(0.0, float(found.group(1))) if found else 0.0


def _numbers(i: Instruction, key: str) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', _braces(i.attributes, key))]


def _braces(attributes: str, key: str) -> str:
  start = attributes.find(key + '={')
  if start < 0:
    return ''
  start, depth = start + len(key) + 1, 0
  for end in range(start, len(attributes)):
    depth += (attributes[end] == '{') - (attributes[end] == '}')
    if not depth:
      return attributes[start + 1:end]
  return attributes[start + 1:]


def dearness(work: Work, rounds: Mapping[str, float] = types.MappingProxyType({})) -> float:
  """Seconds on a chip of middling rates: only to choose between branches and loops."""
  total = work.total(rounds)
  return total.flops / 4e14 + total.hbm / 2e12 + total.received / 2e11
