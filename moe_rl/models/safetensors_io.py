"""Safetensors files by positioned reads: headers, any rectangle of a tensor, folders of shards, a streaming writer.

The format: 8 bytes of header length (little endian), a JSON header of {name: dtype, shape, data_offsets}, the data.
Nothing is mapped into memory: a mapped file counts as resident once it is read, and a loader that wants bounded memory
cannot give those pages back. A read touches the bytes of its rectangle and at most `CHUNK` numbers of scratch memory.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np

DTYPES = {
  'F64': np.dtype(np.float64), 'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16), 'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'I64': np.dtype(np.int64), 'I32': np.dtype(np.int32), 'I16': np.dtype(np.int16), 'I8': np.dtype(np.int8),
  'U8': np.dtype(np.uint8), 'BOOL': np.dtype(np.bool_)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
CHUNK = 1 << 20  # numbers read at a time where rows are cut: 4 MiB of float32
SEEK = 1 << 16  # bytes; a shorter stretch costs less to read over than to skip
INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
DOWNLOAD = 'download or copy it again'


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file: `start` is its first byte, counted from the file's beginning."""

  file: pathlib.Path
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def __getitem__(self, index: tuple[int, ...]) -> 'Tensor':
    """The part at these leading indices, which is contiguous."""
    shape = self.shape[len(index):]
    at = int(np.ravel_multi_index(index, self.shape[:len(index)])) if index else 0
    return dataclasses.replace(self, shape=shape, start=self.start + at * math.prod(shape) * self.dtype.itemsize)

  def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
    """The rectangle [rows, columns] of a matrix, [rows] of a vector, or a scalar; in the file's dtype, C order.

    Bounds as slices have them, step 1. Scratch memory besides the result: `CHUNK` numbers. Raises ValueError with file
    and tensor if the file ends early.
    """
    if len(self.shape) > 2:
      raise ValueError(f'{self.name}: {len(self.shape)} axes, index it down to a matrix')
    count, width = (*self.shape, 1, 1)[:2]
    r0, r1, _ = rows.indices(count)
    c0, c1, _ = columns.indices(width)
    shape = (max(r1 - r0, 0), max(c1 - c0, 0))
    out = np.empty(shape, self.dtype)
    if out.size:
      with open(self.file, 'rb', buffering=0) as f:
        self._fill(f.fileno(), out, r0, c0, width)
    return out.reshape(shape[:len(self.shape)])

  def _fill(self, descriptor: int, out: np.ndarray, r0: int, c0: int, width: int):
    size, wanted = self.dtype.itemsize, out.shape[1]
    if wanted == width:
      self._read(descriptor, out, self.start + r0 * width * size)
    elif min(wanted, width - wanted) * size >= SEEK:
      for i, row in enumerate(out):
        self._read(descriptor, row, self.start + ((r0 + i) * width + c0) * size)
    else:
      step = max(CHUNK // width, 1)
      chunk = np.empty((min(step, len(out)), width), self.dtype)
      for i in range(0, len(out), step):
        part = chunk[:len(out) - i]
        self._read(descriptor, part, self.start + (r0 + i) * width * size)
        out[i:i + step] = part[:, c0:c0 + wanted]

  def _read(self, descriptor: int, out: np.ndarray, at: int):
    view = memoryview(out.view(np.uint8).reshape(-1))
    while view:
      got = os.preadv(descriptor, [view], at)
      if not got:
        raise ValueError(f"{self.file}: ends at byte {at}, within tensor '{self.name}': {DOWNLOAD}")
      view, at = view[got:], at + got


def read_header(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
  """(metadata, tensors by name) of a safetensors file; reads its header only, and its length.

  Raises ValueError, naming the file and where it can the tensor, for what is no safetensors file, for an unknown dtype,
  for offsets that do not fit shape and dtype, and for data beyond the end of the file (a truncated download).
  """
  path = pathlib.Path(path)
  try:
    with path.open('rb') as f:
      total = os.fstat(f.fileno()).st_size
      length = int.from_bytes(f.read(8), 'little')
      if not 2 <= length <= min(HEADER_LIMIT, total - 8):
        raise ValueError(f'{path}: not a safetensors file, or cut within its header ({total} bytes, of which the '
                         f'header would be {length}): {DOWNLOAD}')
      header = json.loads(f.read(length))
      if not isinstance(header, dict):
        raise TypeError
    metadata = header.pop('__metadata__', {})
    tensors = {name: _tensor(path, name, entry, 8 + length, total) for name, entry in header.items()}
  except OSError as e:
    raise ValueError(f'{path}: cannot be read ({e.strerror})') from e
  except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as e:
    raise ValueError(f'{path}: not a safetensors file, its header is no JSON object: {DOWNLOAD}') from e
  return metadata, tensors


def _tensor(path: pathlib.Path, name: str, entry: dict, data: int, total: int) -> Tensor:
  where = f"{path}: tensor '{name}'"
  try:
    dtype, shape, (start, end) = entry['dtype'], tuple(map(int, entry['shape'])), entry['data_offsets']
    sound = 0 <= start <= end and all(n >= 0 for n in shape)
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(f'{where}: its header entry is damaged: {DOWNLOAD}') from e
  if dtype not in DTYPES:
    raise ValueError(f"{where}: dtype {dtype} is not one of {', '.join(DTYPES)}: convert it to one of these")
  tensor = Tensor(path, name, DTYPES[dtype], shape, data + start)
  if not sound or end - start != tensor.nbytes:
    raise ValueError(f'{where}: offsets {start} to {end} do not hold {dtype} {list(shape)}: {DOWNLOAD}')
  if data + end > total:
    raise ValueError(f'{where}: its data ends at byte {data + end}, the file at {total}: it is cut short, {DOWNLOAD}')
  return tensor


def read_folder(folder: str | os.PathLike) -> dict[str, Tensor]:
  """Tensors by name of a checkpoint folder: the shards that model.safetensors.index.json names, or model.safetensors.

  Raises ValueError, besides what `read_header` raises, for a folder with neither, for an index that is damaged or names
  a file that is absent, and for a tensor that is not in the shard the index gives it, or is in a shard unknown to it.
  """
  folder = pathlib.Path(folder)
  index = folder / INDEX
  if not index.exists():
    if not (folder / SINGLE).exists():
      raise ValueError(f'{folder}: has neither {INDEX} nor {SINGLE}: give the folder of a safetensors checkpoint')
    return read_header(folder / SINGLE)[1]
  try:
    places = json.loads(index.read_text())['weight_map']
    by_file: dict[str, set[str]] = {}
    for name, file in places.items():
      by_file.setdefault(file, set()).add(name)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f'{index}: cannot be read as an index with a weight_map: {DOWNLOAD}') from e
  tensors: dict[str, Tensor] = {}
  for file, names in sorted(by_file.items()):
    if not (folder / file).is_file():
      raise ValueError(f"{index}: names {file}, which is not there (tensor '{min(names)}' and {len(names) - 1} more): "
                       f'{DOWNLOAD}')
    found = read_header(folder / file)[1]
    for name in sorted(names ^ found.keys()):
      where = 'is missing' if name in names else 'is in the file but not in the index'
      raise ValueError(f"{folder / file}: tensor '{name}' {where} ({INDEX}): {DOWNLOAD}")
    tensors |= found
  return tensors


# Writing.

Shapes = dict[str, tuple[np.dtype, tuple[int, ...]]]  # name -> dtype and shape


def size_of(shapes: Shapes) -> int:
  """Bytes of data."""
  return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())


def plan_shards(shapes: Shapes, limit: int) -> list[Shapes]:
  """Tensors in order, cut where a shard would exceed `limit` bytes; a bigger tensor has a shard of its own.

  Within a shard wide numbers come first: so every tensor begins at a multiple of its dtype's size.
  """
  shards, filled = [{}], 0
  for name, entry in shapes.items():
    size = size_of({name: entry})
    if filled and filled + size > limit:
      shards.append({})
      filled = 0
    shards[-1][name] = entry
    filled += size
  return [dict(sorted(shard.items(), key=lambda item: -item[1][0].itemsize)) for shard in shards]


def write_folder(folder: pathlib.Path, shapes: Shapes, array: Callable[[str], np.ndarray], limit: int):
  """Writes a checkpoint into an existing folder, holding one tensor at a time.

  shapes: of all tensors, in the order in which they fill the shards; array: name -> the tensor, asked for once each;
  limit: bytes of data a file. One file is model.safetensors; several are model-00001-of-000NN.safetensors with an
  index. Raises OSError as the file system does, and ValueError for an array that is not as announced.
  """
  shards = plan_shards(shapes, limit)
  files = [SINGLE] if len(shards) == 1 else [
    f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
  for file, shard in zip(files, shards, strict=True):
    write_file(folder / file, shard, array, {'format': 'pt'})  # transformers reads no file without this word
  if len(shards) > 1:
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {'metadata': {'total_size': size_of(shapes)}, 'weight_map': dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n')


def write_file(path: pathlib.Path, shapes: Shapes, array: Callable[[str], np.ndarray], metadata: dict[str, str]):
  """One safetensors file, on the disk when this returns; see `write_folder`. Equal tensors give equal bytes."""
  header, at = {'__metadata__': dict(sorted(metadata.items()))}, 0
  for name, (dtype, shape) in shapes.items():
    end = at + size_of({name: (dtype, shape)})
    header[name] = {'dtype': NAMES[dtype], 'shape': list(shape), 'data_offsets': [at, end]}
    at = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text = text.ljust(-(-len(text) // 8) * 8)  # the data begins at a multiple of 8 bytes
  with path.open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    for name, (dtype, shape) in shapes.items():
      value = array(name)
      if (value.dtype, value.shape) != (dtype, shape):
        raise ValueError(f"{path}: tensor '{name}' is {value.dtype} {value.shape}, announced {dtype} {shape}")
      f.write(memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8)))
    f.flush()
    os.fsync(f.fileno())
