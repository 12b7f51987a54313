"""Weights in and out: the names, and every number on its way, FP8 and several hosts included."""

import dataclasses
import json
import math
import pathlib
import re
import socket

import jax
import ml_dtypes
import numpy as np
import pytest
import runs
from families import CASES
from hub import FLOATS, LLAMA, MTP, TIED, V2, assert_same_bits, flat, random_tensor, tensors_of, write_hub
from tiny import tiny_model, tiny_variables

from moe_rl.models import fp8, hf_export, hf_import
from moe_rl.models.checkpoints import faults, open_checkpoint, shapes
from moe_rl.models.config import PRESETS, own_fields, preset
from moe_rl.models.hf_config import from_hf_config
from moe_rl.models.hf_import import load_model
from moe_rl.models.hf_names import SCALE, names
from moe_rl.models.safetensors_io import INDEX, read_folder, write_folder

# Names.

# Shapes of the R1 files, [out, in]: a dense layer, an expert layer, and the rest.
V3_ATTENTION = {
  'self_attn.q_a_proj.weight': (1536, 7168), 'self_attn.q_a_layernorm.weight': (1536,),
  'self_attn.q_b_proj.weight': (24576, 1536), 'self_attn.kv_a_proj_with_mqa.weight': (576, 7168),
  'self_attn.kv_a_layernorm.weight': (512,), 'self_attn.kv_b_proj.weight': (32768, 512),
  'self_attn.o_proj.weight': (7168, 16384), 'input_layernorm.weight': (7168,),
  'post_attention_layernorm.weight': (7168,)}
V3_DENSE = V3_ATTENTION | {
  'mlp.gate_proj.weight': (18432, 7168), 'mlp.up_proj.weight': (18432, 7168), 'mlp.down_proj.weight': (7168, 18432)}
V3_EXPERTS = V3_ATTENTION | {
  'mlp.gate.weight': (256, 7168), 'mlp.gate.e_score_correction_bias': (256,),
  **{f'mlp.{part}.{which}.weight': (7168, 2048) if which == 'down_proj' else (2048, 7168)
     for part in ('shared_experts', *(f'experts.{e}' for e in range(256)))
     for which in ('gate_proj', 'up_proj', 'down_proj')}}
V3_PREDICTION = V3_EXPERTS | {
  'enorm.weight': (7168,), 'hnorm.weight': (7168,), 'eh_proj.weight': (7168, 14336), 'shared_head.norm.weight': (7168,),
  'embed_tokens.weight': (129280, 7168), 'shared_head.head.weight': (129280, 7168)}


def test_the_671b_map_has_every_tensor_of_the_released_files_with_its_shape():
  wanted = {'model.embed_tokens.weight': (129280, 7168), 'model.norm.weight': (7168,), 'lm_head.weight': (129280, 7168)}
  for layer in range(62):
    inside = V3_DENSE if layer < 3 else V3_EXPERTS if layer < 61 else V3_PREDICTION
    wanted |= {f'model.layers.{layer}.{name}': shape for name, shape in inside.items()}
  for name, shape in list(wanted.items()):
    if len(shape) == 2 and not re.search(r'embed_tokens|head|mlp\.gate\.|eh_proj', name):
      wanted[name + SCALE] = (-(-shape[0] // 128), -(-shape[1] // 128))
  slots = names(preset('v3_671b'), fp8=True)
  assert len(slots) == len(wanted) == 91_991
  assert {name: slot.shape for name, slot in slots.items()} == wanted
  assert sum(math.prod(slot.shape) for slot in slots.values() if slot.scale_of) == 41_540_496
  assert slots['model.layers.3.self_attn.kv_a_proj_with_mqa.weight' + SCALE].shape == (5, 56)  # 4.5 blocks of rows


@pytest.mark.parametrize('name', PRESETS)
def test_every_number_of_a_model_is_in_exactly_one_tensor(name):
  model = preset(name)
  slots = [slot for slot in names(model).values() if not slot.copy]
  assert len({(slot.path, slot.index) for slot in slots}) == len(slots)
  wanted = shapes(model)
  assert {slot.path for slot in slots} == wanted.keys()
  counts = dict.fromkeys(wanted, 0)
  for slot in slots:
    own = wanted[slot.path].shape
    assert all(i < n for i, n in zip(slot.index, own, strict=False))
    assert (slot.shape[::-1] if slot.transpose else slot.shape) == own[len(slot.index):], slot
    counts[slot.path] += math.prod(slot.shape)
  assert counts == {path: leaf.size for path, leaf in wanted.items()}


def test_a_tied_head_is_no_tensor_of_its_own_and_the_prediction_layers_copies_are_marked():
  assert 'lm_head.weight' not in names(preset('qwen2_5_1_5b'))
  copies = {name: slot.copy for name, slot in names(preset('v3_671b')).items() if slot.copy}
  assert copies == {'model.layers.61.embed_tokens.weight': 'model.embed_tokens.weight',
                    'model.layers.61.shared_head.head.weight': 'lm_head.weight'}


def test_rotated_rows_become_half_split_head_by_head():
  model = tiny_model(heads=2, nope_dim=3, rope_dim=4)
  order = names(model)['model.layers.0.self_attn.q_proj.weight'].order
  np.testing.assert_array_equal(order, [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 12, 11, 13])
  shared = names(model)['model.layers.0.self_attn.kv_a_proj_with_mqa.weight'].order
  np.testing.assert_array_equal(shared, [*range(16), 16, 18, 17, 19])


# There and back.


@pytest.mark.parametrize('case, form', [*zip(CASES, [*FLOATS] * 4, strict=False), (MTP, 'bfloat16')])
def test_from_the_hub_and_back_changes_no_bit(case, form, tmp_path, take):
  source = write_hub(tmp_path / 'hub', case, form, limit=30_000)
  assert (source / INDEX).exists()  # several shards
  model, variables = load_model(source, param_dtype=form)
  hf_export.export(model, variables, tmp_path / 'back', take=take, form=form, shard_bytes=50_000)
  assert_same_bits(tensors_of(source), tensors_of(tmp_path / 'back'))
  again = from_hf_config(json.loads((tmp_path / 'back' / 'config.json').read_text()), 'back')
  assert own_fields(dataclasses.replace(again, param_dtype=form)) == own_fields(model)


@pytest.mark.parametrize('case', [MTP, TIED])
def test_bfloat16_read_as_float32_and_written_as_bfloat16_changes_no_bit(case, tmp_path, take):
  source = write_hub(tmp_path / 'hub', case)
  model, variables = load_model(source)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {'float32'}
  hf_export.export(model, variables, tmp_path / 'back', take=take)
  assert_same_bits(tensors_of(source), tensors_of(tmp_path / 'back'))


@pytest.mark.parametrize('changes', [dict(mtp_layers=1, q_lora=24), dict(score='softmax', norm_top_k=False)])
def test_to_the_hub_and_back_changes_no_bit(changes, tmp_path, take):
  model = tiny_model(**changes)
  variables = {'router': {}} | jax.device_put(tiny_variables(model))
  if variables['router']:
    variables['router']['moe']['ff']['bias'] += np.float32(0.1) * np.arange(4, dtype=np.float32)
  hf_export.export(model, variables, tmp_path / 'out', take=take, form='float32')
  _, back = load_model(tmp_path / 'out')
  assert_same_bits(flat(back), flat(variables))


def test_every_matrix_lands_transposed_at_its_layer_and_expert(tmp_path):
  folder = write_hub(tmp_path / 'hub', form='float32')
  hub, (_, variables) = tensors_of(folder), load_model(folder)
  ours = flat(variables)
  for layer in (1, 2):  # of the model, after one dense layer
    for e in range(8):
      np.testing.assert_array_equal(ours['params/moe/ff/down'][layer - 1, e],
                                    hub[f'model.layers.{layer}.mlp.experts.{e}.down_proj.weight'].T)
    np.testing.assert_array_equal(ours['router/moe/ff/bias'][layer - 1],
                                  hub[f'model.layers.{layer}.mlp.gate.e_score_correction_bias'])
  np.testing.assert_array_equal(ours['params/unembed'], hub['lm_head.weight'].T)
  np.testing.assert_array_equal(ours['params/mtp/project'], hub['model.layers.3.eh_proj.weight'].T)
  # Content rows of a query head stay, of the 8 rotated ones the even come first.
  up = hub['model.layers.0.self_attn.q_b_proj.weight'].reshape(4, 16, 24)
  wanted = np.concatenate([up[:, :8], up[:, 8::2], up[:, 9::2]], axis=1)
  np.testing.assert_array_equal(ours['params/dense/attention/q_up'][0], wanted.reshape(64, 24).T)


# FP8.

WIDE = dict(hidden_size=160, intermediate_size=136, kv_lora_rank=130, moe_intermediate_size=24)  # partial blocks


def test_fp8_is_dequantised_slice_by_slice_as_the_reference_formula_says(tmp_path, mesh):
  folder = write_fp8(tmp_path / 'hub')
  hub = tensors_of(folder)
  assert hub['model.layers.0.self_attn.kv_a_proj_with_mqa.weight' + SCALE].shape == (2, 2)
  model, variables = load_model(folder, param_dtype='bfloat16')
  ours, slots = flat(variables), names(model)
  for name, slot in slots.items():
    if not slot.scaled:
      continue
    scale = np.repeat(np.repeat(hub[name + SCALE], 128, axis=0), 128, axis=1)[:slot.shape[0], :slot.shape[1]]
    wanted = (hub[name].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
    wanted = wanted if slot.order is None else wanted[slot.order]
    assert ours[slot.path][slot.index].tobytes() == np.ascontiguousarray(wanted.T).tobytes(), name


def write_fp8(folder: pathlib.Path) -> pathlib.Path:
  """Codes and scales at random; what is not quantised is bfloat16."""
  config = CASES[MTP] | WIDE | {'quantization_config': hf_export.FP8_CONFIG}
  model = from_hf_config(config, 'CASES')
  wanted, slots = hf_export.announced(model, 'fp8'), names(model, fp8=True)
  rng = np.random.default_rng(0)

  def tensor(name):
    dtype, shape = wanted[name]
    if dtype == fp8.E4M3:
      return rng.integers(0, 0x7f, shape, np.uint8).view(dtype)  # all finite ones that are not negative
    return rng.uniform(0.1, 1, shape).astype(dtype) if slots[name].scale_of else random_tensor(
      name, slots, dtype, shape)
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config))
  write_folder(folder, wanted, tensor, 10**9)
  return folder


def test_an_fp8_export_is_read_back_within_half_a_step(tmp_path, take):
  source = write_hub(tmp_path / 'hub', MTP, 'float32', **WIDE)
  model, variables = load_model(source)
  hf_export.export(model, variables, tmp_path / 'fp8', take=take, form='fp8')
  written = open_checkpoint(tmp_path / 'fp8')
  assert not faults(written, written.model)
  assert json.loads((tmp_path / 'fp8' / 'config.json').read_text())['quantization_config']['quant_method'] == 'fp8'
  before, after = flat(variables), flat(load_model(tmp_path / 'fp8')[1])
  for slot in names(model).values():
    was, now = before[slot.path][slot.index], after[slot.path][slot.index]
    # A code is within 2^-4 of the number, or 2^-10 of the scale, which is at most a 448th of the largest; what stays
    # bfloat16 is within 2^-8; biases of routers are exact.
    step = 2.0**-4 * np.abs(was) + 2.0**-10 * np.abs(was).max() / 448 if slot.scaled else 2.0**-8 * np.abs(was)
    assert (np.abs(now - was) <= (0 if slot.path.startswith('router/') else step * 1.000001)).all(), slot.path


# Several devices and hosts.

LOAD_ON_A_HOST = """
import sys
import flax, jax, numpy as np
jax.distributed.initialize(f'127.0.0.1:{sys.argv[2]}', 2, int(sys.argv[3]))
from moe_rl.models import safetensors_io
from moe_rl.models.hf_import import load_model
from moe_rl.runtime import mesh as meshes
read, plain = [], safetensors_io.Tensor._read
def counted(self, descriptor, out, at):
  read.append(out.nbytes)
  return plain(self, descriptor, out, at)
safetensors_io.Tensor._read = counted
_, whole = load_model(sys.argv[1])
assert sum(read) == int(sys.argv[4]), 'one device needs each byte once'
read.clear()
mesh = meshes.make_mesh(dict(data=1, fsdp=2, expert=2, tensor=2))
_, sharded = load_model(sys.argv[1], mesh=mesh)
flatten = lambda tree: flax.traverse_util.flatten_dict(tree, sep='/')
whole, sharded = flatten(whole), flatten(sharded)
assert whole.keys() == sharded.keys()
needed = 0
for name, leaf in sharded.items():
  assert leaf.shape == whole[name].shape and not leaf.is_fully_addressable
  parts = {}
  for shard in leaf.addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(whole[name])[shard.index], err_msg=name)
    parts[str(shard.index)] = shard.data.nbytes
  needed += sum(parts.values())
print(sum(read), needed)
"""


def test_each_of_two_hosts_reads_what_its_devices_need_and_that_once(tmp_path):
  """2 processes of 4 devices: fsdp 2 lies across them, experts and heads within each."""
  folder = write_hub(tmp_path / 'hub', V2, 'float32')
  size = sum(tensor.nbytes for tensor in read_folder(folder).values())
  port = free_port()
  hosts = [runs.start_python(LOAD_ON_A_HOST, folder, port, i, size,
                             devices=4) for i in range(2)]
  for host in hosts:
    read, needed = map(int, runs.finish(host).stdout.split()[-2:])
    # Columns as narrow as these are cheaper to read over than to skip: at most the bytes of the whole file.
    assert needed <= read <= size and needed < 0.6 * size


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def test_the_progress_bar_ends_at_the_bytes_that_were_announced(tmp_path, monkeypatch):
  bars, plain = [], hf_import.tqdm.tqdm

  def kept(*args, **kwargs):
    bars.append(plain(*args, **kwargs | {'delay': 0, 'mininterval': 0}))
    return bars[-1]
  monkeypatch.setattr(hf_import.tqdm, 'tqdm', kept)
  folder = write_hub(tmp_path / 'hub', LLAMA)
  load_model(folder)
  [bar] = bars
  assert bar.n == bar.total == sum(tensor.nbytes for tensor in read_folder(folder).values())
  assert re.search(r'kB|KB|B/s', str(bar)) and str(folder) in str(bar)
