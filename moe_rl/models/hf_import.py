"""Weights into sharded arrays, straight from the files: every device's slice is read, reordered, cast and placed.

Layers and experts are stacked on the way. A host reads what its own devices need and that once, leaf by leaf, so that
it holds, besides the arrays themselves, the slices of one leaf on their way to the devices and a few chunks of scratch.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterator

import flax
import flax.linen as nn
import jax
import numpy as np
import tqdm

from moe_rl.models import hf_names
from moe_rl.models.checkpoints import Checkpoint, boxed_shapes, check, open_checkpoint
from moe_rl.models.config import ModelConfig
from moe_rl.models.fp8 import dequantise
from moe_rl.models.hf_names import Slot
from moe_rl.models.safetensors_io import CHUNK, Tensor
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime import saved

READERS = min(16, os.cpu_count() or 1)  # threads: one waits for the disk while others reorder, each with a few chunks
Index = tuple[tuple[int, int], ...]  # from, to along each axis: the part of an array that a device holds


def load_model(path: str | os.PathLike | Checkpoint, *, mesh=None, **model_changes) -> tuple[ModelConfig, dict]:
  """(config, {'params': …, 'router': …}) of a checkpoint of any kind, see `checkpoints.open_checkpoint`, or of one
  that is open already.

  mesh: where the arrays go, by the one sharding table; one device if None. model_changes: fields of ModelConfig in
  place of the checkpoint's: how it runs (param_dtype, compute_dtype, remat, …), or mtp_layers=0 to leave the prediction
  module. Raises ValueError, naming path, tensor and remedy, for what is missing, superfluous, or of another shape or
  dtype, all of it before any data is read.
  """
  checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
  model = dataclasses.replace(checkpoint.model, **model_changes)
  check(checkpoint, model)
  return model, load_variables(checkpoint, model, abstract_variables(model, mesh or meshes.one_device_mesh()))


def abstract_variables(model: ModelConfig, mesh) -> dict:
  """The variables as ShapeDtypeStructs with the table's shardings."""
  boxed = boxed_shapes(model)
  return meshes.abstract(nn.unbox(boxed), meshes.shardings(boxed, mesh))


def load_variables(checkpoint: Checkpoint, model: ModelConfig, wanted: dict) -> dict:
  """Arrays for a tree of ShapeDtypeStructs with shardings, in its dtypes; `check(checkpoint, model)` must have passed.

  Raises ValueError where a tensor that must repeat another does not, or a file was cut since its header was read.
  """
  if checkpoint.kind == 'run':
    return saved.restore(checkpoint.path, checkpoint.step, wanted)
  if checkpoint.kind == 'hub':
    check_copies(checkpoint, model)
  sources, leaves = _sources(checkpoint, model), flax.traverse_util.flatten_dict(wanted, sep='/')
  plans = {path: _plan(sources[path], _held(leaf)) for path, leaf in leaves.items()}
  total = sum(read.nbytes for plan in plans.values() for read in plan)
  out = {}
  with (concurrent.futures.ThreadPoolExecutor(READERS) as pool,
        tqdm.tqdm(total=total, desc=f'reading {checkpoint.where}', unit='B', unit_scale=True, unit_divisor=1024,
                  delay=1, mininterval=1, disable=jax.process_index() > 0) as bar):
    for path, leaf in leaves.items():
      buffers = {index: np.empty([b - a for a, b in index], leaf.dtype) for index in _held(leaf)}
      for done in pool.map(functools.partial(_fill, buffers), plans.pop(path)):
        bar.update(done)
      out[path] = _place(leaf, buffers)
  return {'params': {}, 'router': {}} | flax.traverse_util.unflatten_dict(out, sep='/')


# From tensors of the files to parts of arrays.


@dataclasses.dataclass(frozen=True)
class _Target:
  """index: of a buffer; rows, columns: what the buffer holds of the slot's tensor, rows in our order."""

  index: Index
  rows: tuple[int, int]
  columns: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Read:
  """A tensor, the stretches of its rows and the columns that are needed here, and the buffers they go to."""

  slot: Slot
  tensor: Tensor
  scale: Tensor | None
  targets: list[_Target]
  rows: list[tuple[int, int]]
  columns: tuple[int, int]

  @property
  def nbytes(self) -> int:
    return sum(b - a for a, b in self.rows) * (self.columns[1] - self.columns[0]) * self.tensor.dtype.itemsize


def _sources(checkpoint: Checkpoint, model: ModelConfig) -> dict[str, list[tuple[Slot, Tensor, Tensor | None]]]:
  """What each of our arrays is put together from: matrices or vectors, with their scales."""
  out, tensors = collections.defaultdict(list), checkpoint.tensors
  for name, slot in checkpoint.slots(model).items():
    if slot.copy or slot.scale_of:
      continue
    stacked = slot.shape[:-2]  # our own files hold stacks, the hub's matrices
    for index in np.ndindex(stacked):
      part = dataclasses.replace(slot, index=slot.index + index, shape=slot.shape[len(stacked):])
      out[slot.path].append((part, tensors[name][index], tensors.get(name + hf_names.SCALE)))
  return out


def _held(leaf: jax.ShapeDtypeStruct) -> dict[Index, list[jax.Device]]:
  """The parts of an array that this host's devices hold, and which of them hold each."""
  out = collections.defaultdict(list)
  for device, slices in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
    out[tuple(s.indices(n)[:2] for s, n in zip(slices, leaf.shape, strict=True))].append(device)
  return out


def _plan(sources, indices) -> list[_Read]:
  out = []
  for slot, tensor, scale in sources:
    targets = [target for index in indices if (target := _target(slot, index))]
    if targets:
      columns = min(t.columns[0] for t in targets), max(t.columns[1] for t in targets)
      out.append(_Read(slot, tensor, scale, targets, _merged(_stretch(slot, t) for t in targets), columns))
  return out


def _target(slot: Slot, index: Index) -> _Target | None:
  """What a buffer needs of a slot's tensor, None if nothing."""
  stacked, rest = index[:len(slot.index)], index[len(slot.index):]
  if not all(a <= i < b for i, (a, b) in zip(slot.index, stacked, strict=True)):
    return None
  rest = rest if len(rest) == 2 else (*rest, (0, 1))
  rows, columns = rest[::-1] if slot.transpose else rest
  return _Target(index, rows, columns)


def _stretch(slot: Slot, target: _Target) -> tuple[int, int]:
  """The hub's rows, from and to, among which the target's are."""
  if slot.order is None:
    return target.rows
  rows = slot.order[slice(*target.rows)]
  return int(rows.min()), int(rows.max()) + 1


def _merged(stretches: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
  out = []
  for a, b in sorted(set(stretches)):
    if out and a <= out[-1][1]:
      out[-1] = (out[-1][0], max(b, out[-1][1]))
    else:
      out.append((a, b))
  return out


def _fill(buffers: dict[Index, np.ndarray], read: _Read) -> int:
  """Reads in chunks and writes each into the buffers that want of it. Returns the bytes read."""
  scale = None if read.scale is None else read.scale.read()
  first, last = read.columns
  step = max(CHUNK // max(last - first, 1), 1)
  for start, stop in read.rows:
    for row in range(start, stop, step):
      values = read.tensor.read(slice(row, min(row + step, stop)), slice(first, last))
      values = values.reshape(len(values), -1)
      if scale is not None:
        values = dequantise(values, scale, row, first)
      for target in read.targets:
        part = values[:, target.columns[0] - first:target.columns[1] - first]
        _write(_view(read.slot, target, buffers[target.index]), read.slot, target, part, row)
  return read.nbytes


def _view(slot: Slot, target: _Target, buffer: np.ndarray) -> np.ndarray:
  """The slot's matrix within the buffer, turned as the hub has it."""
  view = buffer[tuple(i - a for i, (a, _) in zip(slot.index, target.index, strict=False))]
  view = view.T if slot.transpose else view
  return view if view.ndim == 2 else view[:, None]


def _write(view: np.ndarray, slot: Slot, target: _Target, part: np.ndarray, row: int):
  """Puts rows row … row + len(part) of the hub's into a view of the target's rows; casts to the buffer's dtype."""
  first, last = target.rows
  if slot.order is None:
    start, stop = max(row, first), min(row + len(part), last)
    if start < stop:
      view[start - first:stop - first] = part[start - row:stop - row]
    return
  order = slot.order[first:last] - row
  here = np.flatnonzero((order >= 0) & (order < len(part)))
  view[here] = part[order[here]]


def _place(leaf: jax.ShapeDtypeStruct, buffers: dict[Index, np.ndarray]) -> jax.Array:
  """The buffers on their devices as one array; each buffer is let go when its copies are made."""
  arrays = []
  for index, devices in _held(leaf).items():
    buffer = buffers.pop(index)
    copies = [jax.device_put(buffer, device, may_alias=False) for device in devices]
    arrays += jax.block_until_ready(copies)
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def check_copies(checkpoint: Checkpoint, model: ModelConfig):
  """Raises ValueError if a tensor that repeats another (a tied head, the prediction layer's embedding and head) differs
  from it. Each of several hosts compares its share of the rows."""
  slots, tensors = hf_names.names(model) | hf_names.repeats(model), checkpoint.tensors
  hosts, host = jax.process_count(), jax.process_index()
  for name, slot in slots.items():
    if not slot.copy or name not in tensors:
      continue
    one, other, (rows, width) = tensors[name], tensors[slot.copy], slot.shape
    step = max(CHUNK // width, 1)
    for row in range(rows * host // hosts, rows * (host + 1) // hosts, step):
      part = slice(row, row + step)
      if one.dtype != other.dtype or one.read(part).tobytes() != other.read(part).tobytes():
        raise ValueError(
          f"{checkpoint.where}: {one.file.name}: tensor '{name}' must repeat '{slot.copy}' and differs from it: " + (
            'set tie_word_embeddings to false in config.json if the output matrix is one of its own' if model.tied else
            'load with mtp_layers=0, which leaves it out'))
