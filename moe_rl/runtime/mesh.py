"""Where arrays live: the mesh, and the tables from the model's logical axes to mesh axes."""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_rl.runtime import torus

AXES = ('data', 'fsdp', 'expert', 'tensor')

# Logical axis -> mesh axes. An axis of size 1 costs nothing, so one table serves a laptop and a pod.
# Training: rows of a batch are split over data, fsdp and expert, their places over tensor; weights are split over all
# but data, gathered for use, a layer at a time; experts are worked on where they lie. A TPU gathers and scatters whole
# tiles, 8 or 16 by 128: dimensions are cut where that leaves some.
TRAINING: dict[str, tuple[str, ...]] = {
  'batch': ('data', 'fsdp', 'expert'),
  'places': ('tensor',),
  'embed': ('fsdp',),
  'heads': ('tensor', 'expert'), 'head_work': ('tensor',),  # of weights, of activations
  'mlp': ('tensor',),
  'vocab': ('tensor',),
  'experts': ('expert', 'tensor'),
  'expert_rows': ('fsdp',),  # the second of a weight's three axes, whichever it is
  'ff_places': ('tensor',), 'ff_hidden': (),  # dense feed-forward: tokens stay, weights come
  'layers': (), 'norm': (), 'latent': (), 'q_lora': (), 'router': (), 'expert_columns': (),
}
# Sampling: a step has few tokens, so weights stay and tokens come. Nothing is gathered over fsdp, which holds copies.
SAMPLING = TRAINING | {
  'embed': (), 'heads': ('tensor',), 'expert_rows': (), 'ff_places': (), 'ff_hidden': ('tensor',),
}
TABLES = {'training': TRAINING, 'sampling': SAMPLING}


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh and the name of a table: all that a model has to know of the machine. It changes no number but by rounding.

  routing: (groups, kept): a token's experts lie in `kept` of `groups` equal parts of them; what the model knows, and
  what says how few devices a token has to go to.
  """

  mesh: Mesh
  table: str = 'training'
  routing: tuple[int, int] = (1, 1)

  @property
  def rules(self) -> dict[str, tuple[str, ...]]:
    return TABLES[self.table]

  @property
  def platform(self) -> str:
    """'cpu', 'gpu' or 'tpu': what the devices are, which may be described only and not there."""
    return self.mesh.devices.flat[0].platform

  def size(self, axes: tuple[str, ...]) -> int:
    return math.prod(self.mesh.shape[a] for a in axes)

  def spec(self, *logical: str | None) -> PartitionSpec:
    return spec(logical, self.rules)

  def constrain(self, x: jax.Array, *logical: str | None) -> jax.Array:
    """x, placed as its logical axes say; an axis that its mesh axes do not divide stays whole."""
    if self.mesh.size == 1:
      return x
    fitting = (a if a is not None and n % self.size(self.rules[a]) == 0 else None
               for a, n in zip(logical, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*fitting)))


def make_mesh(sizes: dict[str, int], devices=None) -> Mesh:
  """A mesh of all devices (or the given ones) with axes `AXES`; sizes as `config.mesh_sizes` gives them. On a TPU slice
  the devices of an axis are neighbours (`torus.arranged`)."""
  return Mesh(torus.arranged(jax.devices() if devices is None else list(devices), tuple(sizes[a] for a in AXES)), AXES)


def one_device_mesh() -> Mesh:
  """This host's first device alone."""
  return make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1])


def spec(logical: tuple[str | None, ...], rules=None) -> PartitionSpec:
  """Mesh axes of an array's logical axes. Raises ValueError for an unknown axis, or when two want one mesh axis."""
  rules, taken, out = rules or TRAINING, {}, []
  for axis in logical:
    if axis is not None and axis not in rules:
      raise ValueError(f"logical axis '{axis}' is not in the sharding table ({', '.join(rules)})")
    mesh_axes = rules[axis] if axis is not None else ()
    for m in mesh_axes:
      if m in taken:
        raise ValueError(f"logical axes '{taken[m]}' and '{axis}' of {logical} both map to mesh axis '{m}'")
      taken[m] = axis
    out.append(mesh_axes or None)
  return PartitionSpec(*out)


def shardings(boxed, mesh: Mesh, rules=None):
  """A tree of boxed parameters (or their shapes) -> the same tree of NamedSharding; unboxed leaves are replicated."""
  def leaf(x):
    boxed = isinstance(x, nn.LogicallyPartitioned)
    return NamedSharding(mesh, spec(x.names, rules) if boxed else PartitionSpec())
  return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def abstract(shapes, placed):
  """Trees of shapes and of shardings as one tree of ShapeDtypeStruct: what programs are compiled from."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


MEMORIES = ('device', 'host')
HOST_MEMORY = 'pinned_host'  # of each device's host, which the device reads and writes by itself


def in_host_memory(placed):
  """A tree of shardings -> the same, in host memory. Raises ValueError where the devices reach none."""
  def one(s: NamedSharding) -> NamedSharding:
    try:
      return s.with_memory_kind(HOST_MEMORY)
    except ValueError as e:
      platform = s.mesh.devices.flat[0].platform
      raise ValueError(f"config.rl.reference_memory 'host': the {platform} devices of this jax {jax.__version__} reach "
                       f"no memory of kind '{HOST_MEMORY}': set it to 'device'") from e
  return jax.tree.map(one, placed)


def rows_over(sizes: Mapping[str, int]) -> int:
  """Over how many devices the rows of a batch are split; sizes by axis, such as `mesh.shape`."""
  return math.prod(sizes[a] for a in TRAINING['batch'])


def rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
  """Batches: `leading` whole axes, then one split over the batch's mesh axes."""
  return NamedSharding(mesh, PartitionSpec(*[None] * leading, TRAINING['batch']))


def alone(mesh: Mesh, placed) -> bool:
  """Whether these are CPU devices that hold all weights each; placed: shardings of the weights. Such a device has its
  rows to itself, and goes at its own pace where a partitioner would let all wait for each other at every layer."""
  return (mesh.size > 1 and rows_over(mesh.shape) == mesh.size and mesh.devices.flat[0].platform == 'cpu'
          and all(p.is_fully_replicated for p in jax.tree.leaves(placed)))


def everywhere(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())
