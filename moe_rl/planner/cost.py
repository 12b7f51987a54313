"""How long work takes at the least on a slice: matrix units, HBM and the interconnect, each at its rate.

Collectives are costed on the torus, by the dimensions that a group of devices spans:

  all-gather, reduce-scatter, all-reduce   rings along every dimension at once; a ring takes in on two links, a line
  on one
  all-to-all                               the busiest link: uniform traffic over a dimension's cut (a quarter of an
                                           all-gather of the same array on a ring)
  collective-permute                       the busiest link when every message takes the shortest way, dimension by
  dimension

A hop costs a microsecond besides (jax-ml.github.io/scaling-book/sharding), which is most of what decoding's small
ones cost.
"""

import collections
import dataclasses
import functools
import math

from moe_rl.planner.count import Collective, Work
from moe_rl.planner.topologies import Topology

HOP = 1e-6  # seconds


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Of each part alone, at its full rate."""

  compute: float
  hbm: float
  interconnect: float

  @property
  def overlapped(self) -> float:
    """All three at once: no program is faster on these chips."""
    return max(self.compute, self.hbm, self.interconnect)

  @property
  def apart(self) -> float:
    """The interconnect waits for the chip and the chip for it; HBM is read while the matrix units work."""
    return max(self.compute, self.hbm) + self.interconnect

  @property
  def bound(self) -> str:
    return max(('compute', 'hbm', 'interconnect'), key=lambda k: getattr(self, k))

  def __add__(self, other: 'Seconds') -> 'Seconds':
    return Seconds(self.compute + other.compute, self.hbm + other.hbm, self.interconnect + other.interconnect)


@dataclasses.dataclass(frozen=True)
class Side:
  """How a group lies along one dimension. chips: distinct places; stride: between them, so many groups share a link;
  ring: it closes on itself."""

  chips: int
  stride: float
  ring: bool

  @property
  def links(self) -> float:
    """Links that a chip takes in on, as a share of its own."""
    return (2 if self.ring else 1) / self.stride

  @property
  def crossing(self) -> float:
    """Uniform traffic: the share of what a chip sends that its busiest link carries."""
    half = self.chips // 2
    return half * (self.chips - half) / self.chips / (2 if self.ring else 1) * self.stride

  @property
  def hops(self) -> float:
    return (self.chips // 2 if self.ring else self.chips - 1) * self.stride


class Network:
  """A slice whose devices, in the order of the mesh, sit at `places`: chip coordinates, then which device of the
  chip."""

  def __init__(self, topology: Topology, places: list[tuple[int, ...]]):
    self.topology, self.generation, self.places = topology, topology.generation, [tuple(p) for p in places]
    self.seconds_of = functools.lru_cache(maxsize=None)(self._seconds_of)

  def seconds(self, work: Work) -> Seconds:
    """work: without loops, of one device (`Work.total`)."""
    g = self.generation
    return Seconds(work.flops / (g.peak / g.devices), work.hbm / (g.hbm_bandwidth / g.devices),
                   sum(n * self.seconds_of(c) for c, n in work.collectives.items()))

  def _seconds_of(self, c: Collective) -> float:
    """One collective's time."""
    if c.kind == 'collective-permute':
      return self._permute(c)
    return max((self._group(c, *form) for form in {self.form(g) for g in c.groups if len(g) > 1}), default=0.0)

  def form(self, group: tuple[int, ...]) -> tuple[tuple[Side, ...], bool]:
    """(how the group lies along the dimensions that it spans, whether it has both devices of a chip). A group that is
    no
    box of chips counts as one line of them."""
    places = [self.places[d] for d in group]
    chips = {p[:-1] for p in places}
    pairs = len({p[-1] for p in places}) > 1
    sides = []
    for d, (size, wraps) in enumerate(zip(self.topology.shape, self.topology.wraps, strict=True)):
      at = sorted({p[d] for p in chips})
      if len(at) > 1:
        stride = (at[-1] - at[0]) / (len(at) - 1)
        sides.append(Side(len(at), stride, wraps and stride * len(at) == size))
    if math.prod(s.chips for s in sides) != len(chips):
      sides = [Side(len(chips), 1, False)]
    return tuple(sides), pairs

  def _group(self, c: Collective, sides: tuple[Side, ...], pairs: bool) -> float:
    g = self.generation
    # Devices of a chip that are in different groups share its links; in one group they take in what both need once.
    share = 1 if pairs else g.devices
    within = c.received / g.pair if pairs else 0.0
    if not sides:
      return within
    hops = HOP * sum(s.hops for s in sides)
    if c.kind in ('all-to-all', 'ragged-all-to-all'):
      sent = min(c.operand, c.result) if c.kind == 'ragged-all-to-all' else c.operand
      return max(max(s.crossing for s in sides) * sent * g.devices / g.link, within) + hops
    time = max(c.received * share / (g.link * sum(s.links for s in sides)), within)
    return time + hops * (2 if c.kind == 'all-reduce' else 1)

  def _permute(self, c: Collective) -> float:
    loads, longest = collections.Counter(), 0
    for source, target in c.groups:
      way = self.way(self.places[source][:-1], self.places[target][:-1])
      loads.update(way)
      longest = max(longest, len(way))
    if not loads:
      moved = any(a != b for a, b in c.groups)
      return c.result / self.generation.pair if moved and self.generation.pair else 0.0
    return max(loads.values()) * c.result / self.generation.link + HOP * longest

  def way(self, a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple]:
    """The directed links (chip, dimension, direction) of the shortest way, dimension by dimension."""
    at, links = list(a), []
    for d, (size, wraps) in enumerate(zip(self.topology.shape, self.topology.wraps, strict=True)):
      distance = b[d] - at[d]
      if wraps and abs(distance) > size / 2:
        distance -= math.copysign(size, distance)
      step = 1 if distance > 0 else -1
      for _ in range(int(abs(distance))):
        links.append((tuple(at), d, step))
        at[d] = (at[d] + step) % size
    return links
