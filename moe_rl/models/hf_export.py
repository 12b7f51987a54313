"""A Hugging Face folder from our arrays: config.json, safetensors with one tensor a layer and an expert, tokenizer.

The folder is filled under another name and renamed when it is whole, so that what is there is never half an export.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import flax
import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from moe_rl.models import fp8, hf_names
from moe_rl.models.config import ModelConfig
from moe_rl.models.hf_config import to_hf_config
from moe_rl.models.hf_names import Slot
from moe_rl.models.safetensors_io import Shapes, plan_shards, size_of, write_folder
from moe_rl.runtime import mesh as meshes

DTYPES = {'bfloat16': np.dtype(ml_dtypes.bfloat16), 'float32': np.dtype(np.float32)}
SHARD_BYTES = 5 * 10**9  # of data a file, as the hub's folders have it
FP8_CONFIG = {'quant_method': 'fp8', 'fmt': 'e4m3', 'activation_scheme': 'dynamic',
              'weight_block_size': [fp8.BLOCK, fp8.BLOCK]}


@dataclasses.dataclass(frozen=True)
class Beside:
  """What lies beside the weights: special ids for config.json (bos_id, eos_id, pad_id), generation_config.json, and
  what writes further files into the folder at last."""

  ids: dict[str, int | list[int] | None] = dataclasses.field(default_factory=dict)
  generation: dict = dataclasses.field(default_factory=dict)
  write_files: Callable[[pathlib.Path], object] = lambda folder: None


def announced(model: ModelConfig, form: str) -> Shapes:
  """Name, dtype and shape of every tensor of the export, in the hub's order; form: 'bfloat16', 'float32' or 'fp8'.

  The router's selection bias stays float32, as in the released files, and so do FP8 scales; what is not quantised
  beside FP8 is bfloat16.
  """
  def dtype(slot: Slot):
    if slot.scale_of or slot.path.startswith('router/'):
      return DTYPES['float32']
    return fp8.E4M3 if form == 'fp8' and slot.scaled else DTYPES['float32' if form == 'float32' else 'bfloat16']
  return {name: (dtype(slot), slot.shape) for name, slot in hf_names.names(model, form == 'fp8').items()}


@functools.lru_cache(maxsize=1)
def make_take(mesh):
  """Jitted (array, int32 [k]) -> the array's part at these k leading indices, on every device of the mesh."""
  def take(array, index):
    for i in range(index.shape[0]):
      array = jax.lax.dynamic_index_in_dim(array, index[i], keepdims=False)
    return array
  return jax.jit(take, out_shardings=meshes.everywhere(mesh))


def hub_tensor(variables: dict, slots: dict[str, Slot], shapes: Shapes, take) -> Callable[[str], np.ndarray]:
  """A function from a name to the tensor as the file has it: the hub's orientation, order of rows and announced dtype.

  variables: arrays by path. On several hosts all must ask for the same names in the same order.
  """
  def plain(slot: Slot) -> np.ndarray:
    value = np.asarray(take(variables[slot.path], np.asarray(slot.index, np.int32)))
    value = value.T if slot.transpose else value
    if slot.order is None:
      return value
    out = np.empty_like(value)
    out[slot.order] = value
    return out

  def tensor(name: str) -> np.ndarray:
    slot, (dtype, _) = slots[name], shapes[name]
    if slot.scale_of:
      return fp8.block_scale(plain(slots[slot.scale_of]))
    value = plain(slot)
    return fp8.quantise(value, fp8.block_scale(value)) if dtype == fp8.E4M3 else value.astype(dtype, copy=False)
  return tensor


def export(model: ModelConfig, variables: dict, out: str | os.PathLike, *, take, form: str = 'bfloat16',
           beside: Beside | None = None, shard_bytes: int = SHARD_BYTES) -> dict:
  """Writes the folder `out`, one tensor at a time, and returns {'out', 'bytes', 'tensors', 'parameters'}.

  take: `make_take` of the mesh that the arrays are on. All of several processes call this, and the first one writes.
  Raises ValueError, leaving nothing behind, if `out` exists and is not empty, if no family of the hub can hold the
  model, or if it cannot be written; the message then says how many bytes are needed.
  """
  beside = beside or Beside()
  config = hub_config(model, form, beside)
  shapes, slots = announced(model, form), hf_names.names(model, form == 'fp8')
  tensor = hub_tensor(flax.traverse_util.flatten_dict(variables, sep='/'), slots, shapes, take)
  if jax.process_index() == 0:
    with whole_folder(pathlib.Path(out).absolute(), size_of(shapes)) as folder:
      for name, content in (('config.json', config), ('generation_config.json', beside.generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + '\n')
      beside.write_files(folder)
      write_folder(folder, shapes, tensor, shard_bytes)
  else:
    for name in (name for shard in plan_shards(shapes, shard_bytes) for name in shard):
      tensor(name)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('export')
  parameters = sum(math.prod(slot.shape) for slot in slots.values() if not (slot.copy or slot.scale_of))
  return {'out': str(out), 'bytes': size_of(shapes), 'tensors': len(shapes), 'parameters': parameters}


def hub_config(model: ModelConfig, form: str, beside: Beside) -> dict:
  """config.json of the export. Raises ValueError, naming the field, if no family of the hub can hold the model."""
  config = to_hf_config(model, dtype='float32' if form == 'float32' else 'bfloat16', **beside.ids)
  return config | ({'quantization_config': FP8_CONFIG} if form == 'fp8' else {})


def check_room(out: pathlib.Path, needed: int):
  """Raises ValueError unless `out` is a free name or an empty folder, and `needed` bytes fit beside it."""
  partial = _partial(out)
  if out.is_dir() and any(out.iterdir()) or out.is_file():
    raise ValueError(f"'{out}': is there already: give a folder that is new or empty")
  if partial.exists():
    raise ValueError(f"'{partial}': an export is being written there, or was killed: remove it if none is running")
  free = shutil.disk_usage(next(p for p in out.parents if p.exists())).free
  if free < needed:
    raise ValueError(f"'{out}': needs {needed:,} bytes, {free:,} are free there: free some or choose another folder")


def _partial(out: pathlib.Path) -> pathlib.Path:
  return out.with_name(out.name + '.partial')


@contextlib.contextmanager
def whole_folder(out: pathlib.Path, needed: int) -> Iterator[pathlib.Path]:
  """A new folder beside `out`, which takes its name at the end; on any failure it is gone, with parents made for it.

  needed: bytes. Raises ValueError as `check_room` does, and for an OSError within.
  """
  check_room(out, needed)
  partial = _partial(out)
  made = [p for p in (out.parent, *out.parent.parents) if not p.exists()]
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
      yield partial
      partial.rename(out)
    except BaseException:
      shutil.rmtree(partial, ignore_errors=True)
      raise
  except BaseException as e:
    for parent in made:
      with contextlib.suppress(OSError):
        parent.rmdir()
    if isinstance(e, OSError):
      raise ValueError(f"'{out}': cannot be written ({e.strerror}): it needs {needed:,} bytes there, nothing was left "
                       'behind; free some space or choose another folder') from e
    raise
