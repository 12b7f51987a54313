"""Where arrays live: the mesh, and the one table from the model's logical axes to mesh axes."""

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'expert', 'tensor')

# Logical axis -> mesh axes. An axis of size 1 costs nothing, so one table serves a laptop and a pod.
RULES: dict[str, tuple[str, ...]] = {
  'batch': ('data', 'fsdp'),
  'embed': ('fsdp',),
  'experts': ('expert',),
  'heads': ('tensor',),
  'mlp': ('tensor',),
  'expert_mlp': ('tensor',),
  'vocab': ('tensor',),
  'layers': (), 'norm': (), 'latent': (), 'q_lora': (), 'router': (),
}


def make_mesh(sizes: dict[str, int], devices=None) -> Mesh:
  """A mesh of all devices (or the given ones) with axes `AXES`; sizes as `config.mesh_sizes` gives them."""
  devices = np.asarray(jax.devices() if devices is None else devices)
  return Mesh(devices.reshape([sizes[a] for a in AXES]), AXES)


def one_device_mesh() -> Mesh:
  """This host's first device alone."""
  return make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1])


def spec(logical: tuple[str | None, ...], rules=None) -> PartitionSpec:
  """Mesh axes of an array's logical axes. Raises ValueError for an unknown axis, or when two want one mesh axis."""
  rules, taken, out = rules or RULES, {}, []
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


def shardings(boxed, mesh: Mesh):
  """A tree of boxed parameters (or their shapes) -> the same tree of NamedSharding; unboxed leaves are replicated."""
  def leaf(x):
    return NamedSharding(mesh, spec(x.names) if isinstance(x, nn.LogicallyPartitioned) else PartitionSpec())
  return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def abstract(shapes, placed):
  """Trees of shapes and of shardings as one tree of ShapeDtypeStruct: what programs are compiled from."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
  """Batches: `leading` whole axes, then one split over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(*[None] * leading, RULES['batch']))


def everywhere(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())
