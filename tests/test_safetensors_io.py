"""Safetensors by positioned reads, the streaming writer, FP8 in blocks: every number, and every damaged file named."""

import json
import os
import struct
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from moe_rl.models import fp8
from moe_rl.models import safetensors_io as io

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope='module')
def rng():
  return np.random.default_rng(0)


def random_bits(rng, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
  """Any bit pattern, NaN and infinity among them; of bool the two that are."""
  if dtype == np.bool_:
    return rng.integers(0, 2, shape).astype(bool)
  return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def assert_same_bits(a: np.ndarray, b: np.ndarray):
  assert (a.dtype, a.shape) == (b.dtype, b.shape)
  assert a.tobytes() == b.tobytes()


# Reading.


@pytest.mark.parametrize('name', io.DTYPES)
def test_every_dtype_comes_back_bit_for_bit(name, tmp_path, rng):
  wanted = {'matrix': random_bits(rng, io.DTYPES[name], (5, 7)), 'vector': random_bits(rng, io.DTYPES[name], (9,)),
            'scalar': random_bits(rng, io.DTYPES[name], ()), 'empty': random_bits(rng, io.DTYPES[name], (0, 3))}
  safetensors.numpy.save_file(wanted, tmp_path / 'x.safetensors', metadata={'made': 'here'})
  metadata, tensors = io.read_header(tmp_path / 'x.safetensors')
  assert metadata == {'made': 'here'} and tensors.keys() == wanted.keys()
  for key, tensor in tensors.items():
    assert_same_bits(tensor.read(), wanted[key])


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.data(), st.integers(1, 40), st.integers(1, 30), st.integers(1, 100), st.integers(1, 60))
def test_any_rectangle_is_the_one_that_numpy_cuts(tmp_path_factory, data, rows, columns, chunk, seek):
  """Whatever the way it is read: whole rows at once, one stretch a row, or chunks of rows that are cut."""
  path = tmp_path_factory.getbasetemp() / 'rectangle.safetensors'
  array = np.arange(3 * rows * columns, dtype=np.int32).reshape(3, rows, columns)
  safetensors.numpy.save_file({'before': np.zeros(3, np.int8), 'x': array}, path)
  r, c = (slice(*sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2)))) for n in (rows, columns))
  tensor = io.read_header(path)[1]['x']
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(io, 'CHUNK', chunk)
    patch.setattr(io, 'SEEK', seek)
    np.testing.assert_array_equal(tensor[1,].read(r, c), array[1, r, c])
    np.testing.assert_array_equal(tensor[2, rows - 1].read(c), array[2, -1, c])
  with pytest.raises(ValueError, match='x: 3 axes'):
    tensor.read()


def test_reading_a_few_columns_needs_a_chunk_of_scratch_memory_and_no_more(tmp_path):
  array = np.zeros((40_000, 512), np.float32)  # 82 MB
  safetensors.numpy.save_file({'x': array}, tmp_path / 'x.safetensors')
  tensor = io.read_header(tmp_path / 'x.safetensors')[1]['x']
  tracemalloc.start()
  got = tensor.read(columns=slice(100, 108))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # The result and one chunk; 0.1 MB for what Python itself takes.
  assert got.nbytes == 40_000 * 8 * 4 and peak < got.nbytes + io.CHUNK * 4 + 1e5


# What is wrong with a file is said with its name, the tensor's, and the remedy.


def damaged(path, header: dict | bytes, data: bytes = b'\0' * 8, length: int | None = None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text) if length is None else length) + text + data)
  return path


def entry(dtype='F32', shape=(2,), offsets=(0, 8)) -> dict:
  return {'blob': {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}}


BAD_FILES = {
  'empty': (dict(header=b'', length=0), 'not a safetensors file'),
  'header longer than the file': (dict(header=entry(), length=1 << 40), 'cut within its header'),
  'no JSON': (dict(header=b'{"blob": '), 'its header is no JSON object'),
  'no object': (dict(header=b'[1, 2]'), 'its header is no JSON object'),
  'no text': (dict(header=b'\xff\xfe\xfd\xfc'), 'its header is no JSON object'),
  'truncated data': (dict(header=entry(), data=b'\0' * 7), "'blob'", 'it is cut short, download or copy it again'),
  'offsets of another size': (dict(header=entry(offsets=(0, 4))), "'blob'", 'offsets 0 to 4 do not hold F32 [2]'),
  'negative offsets': (dict(header=entry(offsets=(-8, 0))), "'blob'", 'offsets -8 to 0 do not hold'),
  'unknown dtype': (dict(header=entry(dtype='F4')), "'blob'", 'dtype F4 is not one of F64, F32', 'convert it'),
  'entry without offsets': (dict(header={'blob': {'dtype': 'F32', 'shape': [2]}}), "'blob'", 'entry is damaged'),
  'entry of another kind': (dict(header={'blob': 3}), "'blob'", 'entry is damaged'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_a_damaged_file_is_refused(name, tmp_path):
  content, *parts = BAD_FILES[name]
  path = damaged(tmp_path / 'x.safetensors', **content)
  with pytest.raises(ValueError) as error:
    io.read_header(path)
  for part in (str(path), *parts):
    assert part in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError, match='none.safetensors: cannot be read'):
    io.read_header(tmp_path / 'none.safetensors')


def test_a_file_cut_after_its_header_was_read_is_noticed_while_reading(tmp_path):
  path = damaged(tmp_path / 'x.safetensors', entry())
  tensor = io.read_header(path)[1]['blob']
  os.truncate(path, path.stat().st_size - 3)
  with pytest.raises(ValueError, match=r"x.safetensors: ends at byte \d+, within tensor 'blob'"):
    tensor.read()


# Folders.


def write_sharded(folder, count: int = 6) -> dict[str, np.ndarray]:
  """`count` tensors of 16 bytes, two a file."""
  arrays = {f't{i}': np.full(4, i, np.float32) for i in range(count)}
  io.write_folder(folder, {k: (v.dtype, v.shape) for k, v in arrays.items()}, arrays.get, 32)
  return arrays


def test_a_sharded_folder_is_read_through_its_index(tmp_path):
  arrays = write_sharded(tmp_path)
  tensors = io.read_folder(tmp_path)
  assert {k: t.file.name for k, t in tensors.items()} == {
    f't{i}': f'model-0000{i // 2 + 1}-of-00003.safetensors' for i in range(6)}
  for name, tensor in tensors.items():
    assert_same_bits(tensor.read(), arrays[name])


def edit(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def absent(folder):
  (folder / 'model-00002-of-00003.safetensors').unlink()


def garbled(folder):
  (folder / io.INDEX).write_text('{"weight_map": 3}')


def wrong_shard(folder):
  edit(folder / io.INDEX, lambda index: index['weight_map'].update(t0='model-00003-of-00003.safetensors'))


def unknown_to_the_index(folder):
  edit(folder / io.INDEX, lambda index: index['weight_map'].pop('t1'))


def neither(folder):
  (folder / io.INDEX).unlink()


BAD_FOLDERS = {
  absent: (io.INDEX, 'names model-00002-of-00003.safetensors, which is not there', "'t2' and 1 more", 'again'),
  garbled: (io.INDEX, 'cannot be read as an index', 'again'),
  wrong_shard: ('model-00001-of-00003.safetensors', "'t0' is in the file but not in the index"),
  unknown_to_the_index: ('model-00001-of-00003.safetensors', "'t1' is in the file but not in the index"),
  neither: (f'has neither {io.INDEX} nor {io.SINGLE}', 'give the folder'),
}


@pytest.mark.parametrize('damage', BAD_FOLDERS, ids=lambda f: f.__name__)
def test_a_damaged_folder_is_refused(damage, tmp_path):
  write_sharded(tmp_path)
  damage(tmp_path)
  with pytest.raises(ValueError) as error:
    io.read_folder(tmp_path)
  for part in (str(tmp_path), *BAD_FOLDERS[damage]):
    assert part in str(error.value)


# Writing.


def test_the_library_reads_what_is_written_and_every_tensor_is_aligned(tmp_path, rng):
  arrays = {f'{i}': random_bits(rng, dtype, (3, i + 1)) for i, dtype in enumerate(io.DTYPES.values())}  # odd sizes
  io.write_folder(tmp_path, {k: (v.dtype, v.shape) for k, v in arrays.items()}, arrays.get, 10**9)
  assert [p.name for p in tmp_path.iterdir()] == [io.SINGLE]
  with safetensors.safe_open(tmp_path / io.SINGLE, framework='numpy') as f:
    assert f.metadata() == {'format': 'pt'}
  for name, found in safetensors.deserialize((tmp_path / io.SINGLE).read_bytes()):
    wanted = arrays.pop(name)
    assert (found['dtype'], found['shape']) == (io.NAMES[wanted.dtype], list(wanted.shape))
    assert found['data'] == wanted.tobytes()
  assert not arrays
  for name, tensor in io.read_folder(tmp_path).items():
    assert tensor.start % tensor.dtype.itemsize == 0, name


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 60))
def test_shards_hold_every_tensor_in_order_and_exceed_the_limit_for_one_big_tensor_only(sizes, limit):
  shapes = {str(i): (np.dtype(np.int8), (n,)) for i, n in enumerate(sizes)}
  shards = io.plan_shards(shapes, limit)
  assert [name for shard in shards for name in shard] == list(shapes)
  assert all(io.size_of(shard) <= limit or sum(n > 0 for _, (n,) in shard.values()) == 1 for shard in shards)


def test_the_index_says_where_each_tensor_is_and_how_large_all_are(tmp_path):
  arrays = write_sharded(tmp_path)
  index = json.loads((tmp_path / io.INDEX).read_text())
  assert index['metadata'] == {'total_size': sum(a.nbytes for a in arrays.values())}
  assert index['weight_map'].keys() == arrays.keys()


def test_the_writer_holds_one_tensor_at_a_time(tmp_path):
  size, shapes = 8 << 20, {str(i): (np.dtype(np.uint8), (8 << 20,)) for i in range(6)}
  tracemalloc.start()
  io.write_folder(tmp_path, shapes, lambda name: np.full(size, int(name), np.uint8), 20 << 20)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2.1 * size  # the next one is made while the name of the last still holds it
  assert len(list(tmp_path.glob('*.safetensors'))) == 3


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"tensor 'x' is float64 \(2,\), announced float32 \(2,\)"):
    io.write_folder(tmp_path, {'x': (np.dtype(np.float32), (2,))}, lambda name: np.zeros(2), 100)


# FP8.


def every_code(shape: tuple[int, int]) -> np.ndarray:
  """All 256 bit patterns of E4M3 over and over."""
  return np.resize(np.arange(256, dtype=np.uint8), shape).view(fp8.E4M3)


@pytest.mark.parametrize('shape', [(128, 128), (576, 130), (5, 300), (257, 1)])
def test_dequantised_is_float32_of_the_code_times_the_scale_of_its_block(shape, rng):
  """576 rows are the latent projection's 4.5 blocks."""
  codes, scale = every_code(shape), rng.uniform(1e-4, 2, fp8.scale_shape(shape)).astype(np.float32)
  got = fp8.dequantise(codes, scale)
  assert got.dtype == np.float32 and scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
  for i, j in np.ndindex(scale.shape):
    block = np.s_[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128]
    np.testing.assert_array_equal(got[block], codes[block].astype(np.float32) * scale[i, j])


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 299), st.integers(1, 300), st.integers(0, 199), st.integers(1, 200))
def test_a_part_is_dequantised_like_the_whole(row, rows, column, columns):
  codes = every_code((300, 200))
  scale = np.random.default_rng(1).uniform(0.5, 2, (3, 2)).astype(np.float32)
  part = np.s_[row:row + rows, column:column + columns]
  np.testing.assert_array_equal(fp8.dequantise(codes[part], scale, row, column), fp8.dequantise(codes, scale)[part])


def test_quantising_moves_a_number_by_a_sixteenth_at_most(rng):
  values = (rng.normal(size=(300, 200)) * 10.0 ** rng.integers(-6, 3, (300, 1))).astype(np.float32)
  scale = fp8.block_scale(values)
  got = fp8.dequantise(fp8.quantise(values, scale), scale)
  spread = np.repeat(np.repeat(scale, 128, 0)[:300], 128, 1)[:, :200]
  # Three bits of mantissa: half a step is 2^-4 of the number; below 2^-6 of the scale half a step is 2^-10 of it.
  # One part in a million for the division and the product, each rounded once.
  assert (np.abs(got - values) <= np.maximum(np.abs(values) * 2.0**-4, spread * 2.0**-10) * (1 + 1e-6)).all()
  largest = np.abs(values[:128, :128]).max()
  assert scale[0, 0] == np.float32(largest) / np.float32(448)
  assert np.abs(got[:128, :128]).max() == pytest.approx(largest)


@pytest.mark.parametrize('value', [0.0, 1e-45, 1e-38, 3e38, -3e38])
def test_blocks_of_zeros_and_of_extremes_quantise_to_finite_numbers(value):
  values = np.full((3, 3), value, np.float32)
  scale = fp8.block_scale(values)
  got = fp8.dequantise(fp8.quantise(values, scale), scale)
  assert np.isfinite(got).all() and scale.item() > 0
  # The smallest float32s are less than the smallest scale times the smallest code: they become 0.
  np.testing.assert_allclose(got, values, rtol=1e-6, atol=448 * np.finfo(np.float32).tiny * 2**-10)


def test_quantised_numbers_stay_as_they_are_when_quantised_again(rng):
  values = rng.normal(size=(128, 128)).astype(np.float32)
  codes = fp8.quantise(values, fp8.block_scale(values))
  again = fp8.dequantise(codes, np.ones((1, 1), np.float32))  # the largest is 448, so the scale comes out as 1
  assert_same_bits(fp8.quantise(again, fp8.block_scale(again)), codes)
