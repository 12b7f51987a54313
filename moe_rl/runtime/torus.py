"""Which chip of a TPU slice gets which place of the mesh: axes as compact boxes of the torus, so that neighbours talk.

An axis takes a factor of each dimension of the chips' grid, and inner axes lie within outer ones. A v5p:8x8x8 with
expert=8 and fsdp=64 has its experts in boxes of 2x2x2, one hop from each other in every dimension, and not in lines of
8, whose busiest link would carry twice as much.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

GATHERED, EXCHANGED, TENSOR = slice(-3, -2), slice(-2, None), slice(-1, None)  # of the mesh's axes, their use
CUBE, FULL_SIDE = 4, 16  # chips of a side of the cubes that 3D slices are built of; of a 2D slice whose links close


def wraps(shape: Sequence[int]) -> tuple[bool, ...]:
  """Whether the chips of each dimension form a ring.

  Optical switches close the rings of 3D slices that are whole 4x4x4 cubes; 2D slices are wired as a ring along a full
  side of 16 only (jax-ml.github.io/scaling-book/tpus).
  """
  flat = len(shape) < 3 or shape[2] == 1
  return tuple(n == FULL_SIDE for n in shape) if flat else (all(n % CUBE == 0 for n in shape),) * len(shape)


def arranged(devices: Sequence, sizes: tuple[int, ...]) -> np.ndarray:
  """The devices as an array of `sizes`; those of another platform than TPU in their own order.

  The last two axes are those that an all-to-all goes over (expert, tensor), the one before that of gathered weights;
  the first (data, whose devices meet once a step) lies across slices, where there are several. Raises ValueError if it
  is no multiple of them.
  """
  plain = np.asarray(devices).reshape(sizes)
  if len(devices) == 1 or not all(hasattr(d, 'coords') for d in devices):
    return plain
  slices = [getattr(d, 'slice_index', None) or 0 for d in devices]
  if (n := len(set(slices))) > 1:
    if sizes[0] % n:
      raise ValueError(f'config.mesh.data {sizes[0]} is not a multiple of the {n} slices, and no other axis should go '
                       f'through the network between them: set it to {n}')
    parts = ([d for d, own in zip(devices, slices, strict=True) if own == s] for s in sorted(set(slices)))
    return np.concatenate([arranged(part, (sizes[0] // n, *sizes[1:])) for part in parts])
  at = {(*d.coords, getattr(d, 'core_on_chip', 0)): d for d in devices}
  shape = tuple(len({place[k] for place in at}) for k in range(4))
  first = tuple(min(place[k] for place in at) for k in range(4))
  if math.prod(shape) != len(devices) or len(at) != len(devices):  # no whole box
    return plain
  grid = np.empty(shape, object)
  for place, device in at.items():
    grid[tuple(np.subtract(place, first))] = device
  best = ways(shape, tuple(sizes))
  return next((m for m in (laid(grid, way) for way in best) if rows_by_host(m)), laid(grid, best[0]) if best else plain)


def rows_by_host(mesh: np.ndarray) -> bool:
  """Whether no two hosts share a row of a batch, as each makes its own: the last axis, over which rows do not lie,
  stays within hosts."""
  return all(len({getattr(d, 'process_index', 0) for d in group}) == 1 for group in mesh.reshape(-1, mesh.shape[-1]))


def laid(grid: np.ndarray, way: tuple[tuple[int, ...], ...]) -> np.ndarray:
  """The grid as a mesh. Within an axis the first dimension turns fastest but for a chip's own devices: hosts have 2x2x1
  chips, which so hold neighbouring rows."""
  axes = range(len(way[0]))
  order = [d * len(axes) + a for a in axes for d in (2, 1, 0, 3)]
  sizes = [math.prod(factor[a] for factor in way) for a in axes]
  return grid.reshape([factor[a] for factor in way for a in axes]).transpose(order).reshape(sizes)


@functools.cache
def ways(shape: tuple[int, ...], sizes: tuple[int, ...]) -> list[tuple[tuple[int, ...], ...]]:
  """Of each dimension of the grid (the fourth: devices of a chip), the factor that each axis takes: every way that
  gives these sizes, those first that take the least time for as many bytes in each kind of exchange."""
  found = [w for w in cuts(shape, sizes) if all(math.prod(f[a] for f in w) == n for a, n in enumerate(sizes))]
  return sorted(found, key=lambda w: time(w, shape))


def cuts(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
  """Every way to write each dimension as a product of a factor of each axis."""
  return itertools.product(*(
    [f for f in itertools.product(*([k for k in range(1, n + 1) if n % k == 0 and s % k == 0] for s in sizes))
     if math.prod(f) == n] for n in shape))


def time(way: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> float:
  """Of an all-to-all over the last two axes and a gather over the last and the third from last, in units of a byte on a
  link; devices of one chip are as one."""
  closed = wraps(shape[:3])

  def lies(axes: slice) -> list[tuple[int, int, bool]]:
    """(chips, stride, whether it closes) along each dimension that these axes span."""
    out = []
    for factor, n, ring in zip(way[:3], shape, closed, strict=False):
      chips, stride = math.prod(factor[axes]), math.prod(factor[axes.stop:]) if axes.stop else 1
      if chips > 1:
        out.append((chips, stride, ring and chips * stride == n))
    return out
  exchanged = max((half * (n - half) / n / (2 if ring else 1) * stride
                   for n, stride, ring in lies(EXCHANGED) for half in [n // 2]), default=0)
  links = (sum((2 if ring else 1) / stride for _, stride, ring in lies(axes)) for axes in (GATHERED, TENSOR))
  return exchanged + sum(1 / n for n in links if n)
