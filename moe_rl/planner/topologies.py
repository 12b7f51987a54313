"""TPU generations and slices: what a chip can do, how chips are wired, and the mesh over them.

A topology is written GENERATION:XxYxZ in chips, as the TPU compiler names it: `v5p:8x8x16` are 1,024 chips. Two other
ways of counting are in use and must not be mixed in: Cloud's accelerator types count TensorCores for v4 and v5p
(`v5p-2048` are those 1,024 chips) and chips for v5e and v6e; and JAX counts devices, of which a v5p chip is one and a
v4 (without megacore) or tpu7x chip is two.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import os

from moe_rl.runtime import torus

GIB = 2**30
PLATFORM = 'tpu'
# Shapes on sale, for messages and suggestions (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x). Others work.
SHAPES_2D = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
SHAPES_3D = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16')


@dataclasses.dataclass(frozen=True)
class Generation:
  """One TPU generation. Rates and sizes are of a chip; a second is wall time.

  peak: dense bf16 FLOP/s; hbm_bandwidth: bytes/s; hbm_device: bytes that the compiler lets a program of one device use;
  devices: JAX devices on a chip; dimensions: of its torus or mesh; link: bytes/s of one ICI link in one direction, as
  reached and not as printed (0.9 of it); pair: the same between the two devices of a chip, 0 where a chip is one
  device.
  """

  name: str
  peak: float
  hbm_bandwidth: float
  hbm_device: float
  devices: int
  dimensions: int
  link: float
  pair: float = 0.0

  @property
  def shapes(self) -> tuple[str, ...]:
    return SHAPES_2D if self.dimensions == 2 else SHAPES_3D


# peak, HBM bandwidth: the tables 'system architecture' of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}.
# link: jax-ml.github.io/scaling-book/tpus, its table of one-way bandwidths (TPU docs print a chip's links in both
# directions: v5p 1,200 GB/s is 6 links x 2 directions x 100 GB/s, of which the book has 90).
# hbm_device: what libtpu 0.0.52 says is available when a program does not fit, in GiB a device; the documents say 32,
# 16, 95, 32 and 192 a chip.
# pair: tpu7x's die-to-die interface is six times as fast as one ICI axis (docs.cloud.google.com/tpu/docs/tpu7x); for
# v4, whose two cores share one HBM, HBM's rate.
GENERATIONS: dict[str, Generation] = {g.name: g for g in (
  Generation('v4', 275e12, 1228e9, 15.25 * GIB, 2, 3, 45e9, pair=1228e9),
  Generation('v5e', 197e12, 819e9, 15.75 * GIB, 1, 2, 45e9),
  Generation('v5p', 459e12, 2765e9, 95.73 * GIB, 1, 3, 90e9),
  Generation('v6e', 918e12, 1638e9, 31.24 * GIB, 1, 2, 90e9),
  Generation('tpu7x', 2307e12, 7380e9, 94.74 * GIB, 2, 3, 90e9, pair=6 * 90e9),
)}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice. shape: chips along each dimension of the generation's network."""

  generation: Generation
  shape: tuple[int, ...]

  @property
  def name(self) -> str:
    return f'{self.generation.name}:{"x".join(map(str, self.shape))}'

  @property
  def chips(self) -> int:
    return math.prod(self.shape)

  @property
  def devices(self) -> int:
    return self.chips * self.generation.devices

  @property
  def hosts(self) -> int:
    """Machines, a process each: of 4 chips, or of 8 where that is a whole 2D slice."""
    return 1 if self.generation.dimensions == 2 and self.chips <= 8 else max(1, self.chips // 4)

  @property
  def wraps(self) -> tuple[bool, ...]:
    """Whether the chips of each dimension form a ring."""
    return torus.wraps(self.shape)


def parse(text: str) -> Topology:
  """`v5p:8x8x16` as a Topology. Raises ValueError naming the nearest that works, and those that work."""
  if not text.strip():
    raise ValueError('--topology is empty: name the slice as GENERATION:CHIPSxCHIPS…, such as --topology=v5p:8x8x16')
  generation, _, shape = text.strip().lower().partition(':')
  if generation not in GENERATIONS:
    near = difflib.get_close_matches(generation, GENERATIONS, 1, 0.5)
    raise ValueError(f"--topology={text}: there is no TPU generation '{generation}'"
                     + (f": did you mean '{near[0]}'?" if near else '.')
                     + f' Write GENERATION:CHIPSxCHIPS…, generation one of {", ".join(GENERATIONS)}')
  g = GENERATIONS[generation]
  parts = shape.split('x')
  if len(parts) != g.dimensions or not all(p.isdigit() and int(p) > 0 for p in parts):
    near = difflib.get_close_matches(shape, g.shapes, 1, 0)
    raise ValueError(f"--topology={text}: '{shape}' is no shape of {generation}, which has {g.dimensions} dimensions: "
                     f'the nearest is {generation}:{near[0]}; on sale are {", ".join(g.shapes)}')
  topology = Topology(g, tuple(map(int, parts)))
  largest = max(math.prod(map(int, s.split('x'))) for s in g.shapes)
  single = topology.chips == 1 and g.dimensions == 2
  if not single and (any(n % 2 for n in topology.shape[:2]) or topology.chips > largest):
    near = min(g.shapes, key=lambda s: abs(math.log(math.prod(map(int, s.split('x'))) / topology.chips)))
    raise ValueError(f'--topology={text}: hosts hold 2x2 chips and a slice at most {largest:,}: the nearest is '
                     f'{generation}:{near}; on sale are {", ".join(g.shapes)}')
  return topology


def set_environment():
  """What the TPU compiler needs on a machine without a TPU. Before jax is imported."""
  os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')


@functools.cache
def devices(topology: Topology) -> tuple:
  """The slice's devices, abstract: programs are compiled for them and cannot run. Raises ValueError without libtpu."""
  from jax.experimental import topologies
  try:
    return tuple(topologies.get_topology_desc(platform=PLATFORM, topology_name=topology.name).devices)
  except Exception as e:  # jax raises several types here
    if 'libtpu' in str(e).lower() or 'plugin' in str(e).lower() or 'nknown backend' in str(e):
      raise ValueError(MISSING) from e
    raise ValueError(f'--topology={topology.name}: the TPU compiler refuses it: {str(e).splitlines()[0]}') from e


MISSING = "the TPU compiler (libtpu) is not installed: pip install 'moe_rl[plan]', or -e '.[plan]' in the repository"


def require_libtpu():
  """Raises ValueError, with the remedy, if the TPU compiler is not installed."""
  import importlib.util
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(MISSING)


def order(topology: Topology, sizes: tuple[int, ...]):
  """The devices as an array of `sizes`, in the order that a run takes them in too (`runtime.torus`)."""
  return torus.arranged(devices(topology), sizes)


def place(device, topology: Topology) -> tuple[int, ...]:
  """Where a device sits: its chip's coordinates along the topology's dimensions, then which of the chip's devices."""
  return (*device.coords[:len(topology.shape)], getattr(device, 'core_on_chip', 0))


def factors(total: int, parts: int) -> list[tuple[int, ...]]:
  """Every way to write `total` as a product of `parts` ordered factors."""
  if parts == 1:
    return [(total,)]
  divisors = [d for d in range(1, total + 1) if total % d == 0]
  return list(itertools.chain.from_iterable(
    [(d, *rest) for rest in factors(total // d, parts - 1)] for d in divisors))
