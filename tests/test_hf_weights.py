"""Weights in and out: the names, every number on its way, and what is refused, with file, tensor and remedy."""

import dataclasses
import json
import math
import pathlib
import re
import resource
import shutil
import socket
import subprocess
import sys
import types
import zlib

import flax
import jax
import ml_dtypes
import numpy as np
import pytest
import runs
import safetensors.numpy
from families import CASES
from tiny import quick_jit, tiny_model, tiny_variables

from moe_rl import export as export_command
from moe_rl import inspect as inspect_command
from moe_rl.config import base_config
from moe_rl.main import launch
from moe_rl.models import fp8, hf_export, hf_import
from moe_rl.models.checkpoints import faults, open_checkpoint, shapes
from moe_rl.models.config import PRESETS, own_fields, preset
from moe_rl.models.hf_config import from_hf_config
from moe_rl.models.hf_import import load_model
from moe_rl.models.hf_names import SCALE, names
from moe_rl.models.safetensors_io import INDEX, SINGLE, read_folder, write_folder
from moe_rl.models.transformer import Transformer
from moe_rl.models.weights import EMBEDDED, save_weights
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.run import CompileCounter, Run
from moe_rl.runtime.state import TrainState, make_optimizer
from moe_rl.stages.export import Export
from moe_rl.stages.pretrain import Pretraining
from moe_rl.stages.start import Start


def case_of(family: str, **fields) -> str:
  """The first case of a family whose config.json has these fields."""
  return next(case for case, config in CASES.items()
              if config['model_type'] == family and all(config.get(k) == v for k, v in fields.items()))


MTP = case_of('deepseek_v3', num_nextn_predict_layers=1)
TIED, LLAMA, V2 = case_of('qwen2', tie_word_embeddings=True), case_of('llama'), case_of('deepseek_v2', q_lora_rank=24)
FLOATS = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


@pytest.fixture(scope='module')
def mesh():
  return meshes.make_mesh(dict.fromkeys(meshes.AXES, 1), jax.devices()[:1])


@pytest.fixture(scope='module')
def take(mesh):
  return hf_export.make_take(mesh)


def random_tensor(name: str, slots: dict, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
  """Normal numbers of all their bits, by name; a copy has its original's."""
  seed = slots[name].copy or name
  return np.random.default_rng(zlib.crc32(seed.encode())).normal(size=shape).astype(np.float32).astype(dtype)


def write_hub(folder: pathlib.Path, case=MTP, form='bfloat16', limit=10**9, **changes) -> pathlib.Path:
  """A random checkpoint of the case's sizes, as the hub has them; `changes` to its config.json."""
  config = CASES[case] | changes
  model = from_hf_config(config, 'CASES')
  wanted, slots = hf_export.announced(model, form), names(model)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config))
  write_folder(folder, wanted, lambda name: random_tensor(name, slots, *wanted[name]), limit)
  return folder


def flat(variables: dict) -> dict[str, np.ndarray]:
  return {k: np.asarray(v) for k, v in flax.traverse_util.flatten_dict(variables, sep='/').items()}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]):
  assert a.keys() == b.keys()
  for name in a:
    assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
    assert a[name].tobytes() == b[name].tobytes(), name


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
  return {name: tensor.read() for name, tensor in read_folder(folder).items()}


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
  environment = runs.environment(XLA_FLAGS='--xla_force_host_platform_device_count=4')
  hosts = [subprocess.Popen([sys.executable, '-c', LOAD_ON_A_HOST, str(folder), str(port), str(i), str(size)],
                            cwd=runs.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
           for i in range(2)]
  for host in hosts:
    out, err = host.communicate(timeout=300)
    assert host.returncode == 0, err
    read, needed = map(int, out.split()[-2:])
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


# Kinds of checkpoints.


def test_the_embedded_base_and_files_of_ours_hold_what_was_saved(tmp_path):
  model = tiny_model(mtp_layers=1)
  variables = tiny_variables(model)
  save_weights(tmp_path / 'a.safetensors', variables, own_fields(model), dtype='float32')
  found, loaded = load_model(tmp_path / 'a.safetensors', remat='dots')
  assert found == dataclasses.replace(model, remat='dots')
  assert_same_bits(flat(loaded), flat(variables))
  found, loaded = load_model('embedded', mtp_layers=0)
  file = safetensors.numpy.load_file(EMBEDDED)
  assert {k: v.shape for k, v in flat(loaded).items()} == {
    k: v.shape for k, v in file.items() if '/mtp/' not in k}
  for name, value in flat(loaded).items():
    np.testing.assert_array_equal(value, file[name].astype(np.float32))


def saved_run(path: pathlib.Path, variables: dict, model, steps=(3,)) -> pathlib.Path:
  """A run's folder with a checkpoint of these weights at the last of the steps, of others before."""
  config = base_config('tiny')
  config.model = own_fields(model)
  run = Run(config, path)
  run.restore(None)
  for step in steps:
    params = jax.tree.map(lambda x, step=step: jax.numpy.asarray(x) + np.float32(step - steps[-1]), variables['params'])
    run.save(step, TrainState(jax.numpy.int32(step), params, variables['router'], {'m': params}, {}), {})
  run.close()
  return path


def test_a_runs_newest_checkpoint_gives_its_weights_and_model(tmp_path):
  model = tiny_model(mtp_layers=1)
  variables = jax.tree.map(jax.numpy.asarray, tiny_variables(model))
  path = saved_run(tmp_path / 'run', variables, model, steps=(2, 5))
  checkpoint = open_checkpoint(path)
  assert (checkpoint.kind, checkpoint.step, checkpoint.model) == ('run', 5, model)
  found, loaded = load_model(path, mtp_layers=0, param_dtype='bfloat16')
  wanted = {k: v.astype(ml_dtypes.bfloat16) if k.startswith('params') else v
            for k, v in flat(variables).items() if '/mtp/' not in k}
  assert_same_bits(flat(loaded), wanted)
  assert found.mtp_layers == 0


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text('{"stage": "rl", "model": {}}')
  with pytest.raises(ValueError, match="a run's folder without a checkpoint: let the run reach its first one"):
    open_checkpoint(tmp_path)


HUB_IDS = """
import sys
from moe_rl.models.checkpoints import open_checkpoint
print(open_checkpoint('someone/cached').model.layers, open_checkpoint('someone/cached@main').kind)
try:
  open_checkpoint('someone/elsewhere')
except ValueError as e:
  print(e)
"""


def test_a_hub_id_is_taken_from_the_cache_and_what_is_not_there_is_said(tmp_path):
  pytest.importorskip('huggingface_hub', reason='hub ids need huggingface_hub')
  cache = tmp_path / 'hub' / 'models--someone--cached'
  write_hub(cache / 'snapshots' / ('0' * 40), LLAMA)
  (cache / 'refs').mkdir()
  (cache / 'refs' / 'main').write_text('0' * 40)
  found, error = runs.python(HUB_IDS, HF_HOME=str(tmp_path), HF_HUB_OFFLINE='1').strip().split('\n', 1)
  assert found == '2 hub'
  assert "'someone/elsewhere': no such folder" in error and 'give a local folder' in error and 'Traceback' not in error


def test_a_hub_id_without_the_library_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r"needs huggingface_hub: pip install 'moe_rl\[hf\]'"):
    open_checkpoint('someone/something')


def test_a_tied_models_files_may_repeat_the_embedding_as_head_but_not_differ(tmp_path):
  folder = write_hub(tmp_path / 'hub', TIED)
  tensors = tensors_of(folder)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  rewrite(folder, tensors)
  load_model(folder)
  tensors['lm_head.weight'][3, 5] += 1
  rewrite(folder, tensors)
  refused(folder, "'lm_head.weight' must repeat 'model.embed_tokens.weight'", 'set tie_word_embeddings to false')


def test_weights_without_the_promised_prediction_layer_are_a_model_without_it(tmp_path):
  folder = write_hub(tmp_path / 'hub')
  rewrite(folder, {k: v for k, v in tensors_of(folder).items() if '.layers.3.' not in k})
  assert load_model(folder)[0].mtp_layers == 0
  refused(folder, "missing ['model.layers.3.", 'load with mtp_layers=0', mtp_layers=1)


# What is refused, before any data is read.


def rewrite(folder: pathlib.Path, tensors: dict[str, np.ndarray]):
  for path in folder.glob('*.safetensors*'):
    path.unlink()
  write_folder(folder, {k: (v.dtype, v.shape) for k, v in tensors.items()}, tensors.get, 10**9)


def refused(folder, *parts: str, **model_changes) -> str:
  with pytest.raises(ValueError) as error:
    load_model(folder, **model_changes)
  for part in (str(folder), *parts):
    assert part in str(error.value), str(error.value)
  return str(error.value)


def set_config(folder, **changes):
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | changes))


def change(name: str, to):
  """A damage: the tensor becomes `to` of it, or goes where that is None."""
  def damage(folder):
    tensors = tensors_of(folder)
    value = to(tensors.pop(name, None))
    rewrite(folder, tensors | ({} if value is None else {name: value}))
  return damage


def truncated(folder):
  path = folder / SINGLE
  with path.open('r+b') as f:
    f.truncate(path.stat().st_size - 10)


def absent_shard(folder):
  tensors = tensors_of(folder)
  (folder / SINGLE).unlink()
  write_folder(folder, {k: (v.dtype, v.shape) for k, v in tensors.items()}, tensors.get, 20_000)
  (folder / 'model-00002-of-00003.safetensors').unlink()


def no_config(folder):
  (folder / 'config.json').unlink()


def broken_config(folder):
  (folder / 'config.json').write_text('{"model_type": ')


Q_PROJ, BIAS = 'model.layers.1.self_attn.q_proj.weight', 'model.layers.0.self_attn.q_proj.bias'
BAD = {
  'truncated shard': (LLAMA, truncated, SINGLE, "tensor '", 'it is cut short, download or copy it again'),
  'missing tensor': (LLAMA, change(Q_PROJ, lambda x: None), f"missing ['{Q_PROJ}'], superfluous []", 'Download'),
  'missing head': (LLAMA, change('lm_head.weight', lambda x: None), "missing ['lm_head.weight']",
                   'set tie_word_embeddings to true'),
  'extra tensor': (LLAMA, change('model.layers.1.mystery', lambda x: np.zeros(3, np.float32)),
                   "superfluous ['model.layers.1.mystery'] (in model.safetensors)", 'correct'),
  'a layer too many': (LLAMA, lambda folder: set_config(folder, num_hidden_layers=1), "'model.layers.1.",
                       'superfluous', 'and 6 more'),
  'wrong shape': (LLAMA, change(Q_PROJ, lambda x: x[:-1]), SINGLE, f"'{Q_PROJ}' has shape [31, 32]",
                  'needs [32, 32]', 'config.json'),
  'wrong dtype': (LLAMA, change(Q_PROJ, lambda x: x.astype(np.int8)), SINGLE, f"'{Q_PROJ}' is int8",
                  'convert it to bfloat16'),
  'FP8 without scales': (LLAMA, change(Q_PROJ, lambda x: x.astype(fp8.E4M3)), f"missing ['{Q_PROJ}{SCALE}']"),
  'an FP8 norm': (LLAMA, change('model.norm.weight', lambda x: x.astype(fp8.E4M3)), "'model.norm.weight' is float8"),
  'index naming an absent file': (LLAMA, absent_shard, INDEX, 'model-00002-of-00003.safetensors, which is not there'),
  'family mismatch': (LLAMA, change(BIAS, lambda x: np.zeros(32, np.float32)), 'says llama', 'those of qwen2',
                      'correct model_type'),
  'v2 said to be v3': (V2, lambda folder: set_config(
    folder, model_type='deepseek_v3', topk_method='noaux_tc'), 'says deepseek_v3',
    'those of deepseek_v2', 'e_score_correction_bias'),
  'vocabulary larger than the embedding': (LLAMA, lambda folder: set_config(folder, vocab_size=96),
                                           "'model.embed_tokens.weight' has shape [80, 32]",
                                           'the vocabulary of 96 is larger than the embedding, 80 rows', 'vocab_size'),
  'no config': (LLAMA, no_config, 'has no config.json', 'give the folder of'),
  'broken config': (LLAMA, broken_config, 'config.json: not JSON', 'again'),
  'a field that is not implemented': (LLAMA, lambda folder: set_config(folder, attention_bias=True), 'attention_bias'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_checkpoint_that_does_not_fit_is_refused_before_any_data_is_read(name, tmp_path, monkeypatch):
  case, damage, *parts = BAD[name]
  folder = write_hub(tmp_path / 'hub', case)
  damage(folder)
  monkeypatch.setattr('moe_rl.models.safetensors_io.Tensor._read', None)
  refused(folder, *parts)


def test_a_file_cut_after_its_header_was_read_names_file_and_tensor(tmp_path, mesh):
  folder = write_hub(tmp_path / 'hub', LLAMA)
  checkpoint = open_checkpoint(folder)
  truncated(folder)
  with pytest.raises(ValueError, match=rf"{SINGLE}: ends at byte \d+, within tensor 'lm_head"):
    hf_import.load_variables(checkpoint, checkpoint.model, hf_import.abstract_variables(checkpoint.model, mesh))


# The start of a stage.


def start_of(folder, mesh, **changes) -> Start:
  config = base_config('tiny')
  config.init_from = str(folder)
  model = dataclasses.replace(open_checkpoint(folder).model, mtp_layers=0, **changes)
  return Start(config, model, make_optimizer(config, 10), mesh, reference=True)


def test_a_stage_starts_from_the_files_without_making_random_weights(tmp_path, mesh):
  folder = write_hub(tmp_path / 'hub')
  start, compiles = start_of(folder, mesh, compute_dtype='bfloat16'), CompileCounter()
  state = start.state()
  assert compiles.count == 1  # step, optimizer and reference
  wanted = flat(load_model(folder, mtp_layers=0)[1])
  assert_same_bits(flat(state.variables), wanted)
  assert_same_bits(flat({'params': state.reference}), {k: v for k, v in wanted.items() if k.startswith('params')})
  assert int(state.step) == 0 and all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
  # Donated with the state, the reference must not be the parameters' own memory.
  own, other = state.params['embed'], state.reference['embed']
  assert own.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
  assert jax.tree.map(lambda x: x.sharding, state) == start.shardings


def test_pretraining_goes_on_from_weights_with_their_prediction_module(mesh):
  config = runs.load_experiment('experiments/pretrain.py')
  config.init_from = 'embedded'
  state = Pretraining(config, mesh).initial_state()
  assert_same_bits(flat(state.variables), flat(load_model('embedded')[1]))
  assert 'mtp' in state.params and state.reference == {}


@pytest.mark.parametrize('changes, phrase', [
  (dict(rope_theta=5e5), 'config.model.rope_theta was 10000.0, is 500000.0'),
  (dict(yarn=None), 'config.model.yarn was'),
  (dict(route_scale=1.0), 'config.model.route_scale was 2.5, is 1.0')])
def test_a_model_that_differs_where_numbers_change_is_refused_by_field(changes, phrase, tmp_path, mesh):
  folder = write_hub(tmp_path / 'hub')
  with pytest.raises(ValueError) as error:
    start_of(folder, mesh, **changes).state()
  for part in (f"config.init_from '{folder}'", phrase, 'Set config.model'):
    assert part in str(error.value)


def test_a_model_of_another_family_is_refused_by_field(tmp_path, mesh):
  folder = write_hub(tmp_path / 'hub', LLAMA)
  config = base_config('tiny')
  config.init_from = str(folder)
  start = Start(config, tiny_model(), make_optimizer(config, 10), mesh, reference=False)
  with pytest.raises(ValueError, match=r"its weights do not fit.*config.model.attention was 'gqa', is 'mla'"):
    start.state()


# Export.


def test_an_export_says_what_it_wrote_and_has_the_tokenizer_that_belongs_to_the_weights(tmp_path, capsys):
  out = tmp_path / 'deep' / 'out'
  assert export_command.main([f'--init_from={"embedded"}', f'--out={out}']) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['tensors'] == len(read_folder(out)) and said['bytes'] == sum(t.nbytes for t in read_folder(out).values())
  config = json.loads((out / 'config.json').read_text())
  assert (config['eos_token_id'], config['pad_token_id'], config['torch_dtype']) == (1, 0, 'bfloat16')
  assert json.loads((out / 'generation_config.json').read_text()) == {'eos_token_id': 1, 'pad_token_id': 0}
  assert (out / 'tokenizer.model').read_bytes() == (EMBEDDED.parent / 'tiny_tokenizer.model').read_bytes()
  assert_same_bits(flat(load_model(out)[1]), flat(load_model('embedded')[1]))
  assert not list(out.parent.glob('*.partial'))


def test_an_export_of_a_hub_folder_takes_its_companions_along(tmp_path):
  source = write_hub(tmp_path / 'hub', LLAMA, bos_token_id=7, eos_token_id=[8, 9])
  (source / 'tokenizer.json').write_text('{"kept": "as it is"}')
  (source / 'generation_config.json').write_text('{"eos_token_id": [8, 9], "temperature": 0.6}')
  export_command.run(str(source), str(tmp_path / 'out'), 'float32')
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert (config['bos_token_id'], config['eos_token_id'], config['torch_dtype']) == (7, [8, 9], 'float32')
  for name in ('tokenizer.json', 'generation_config.json'):
    assert (tmp_path / 'out' / name).read_bytes() == (source / name).read_bytes()


def test_a_run_is_exported_with_its_tokenizer(tmp_path):
  model = tiny_model(vocab_size=384)
  path = saved_run(tmp_path / 'run', jax.tree.map(jax.numpy.asarray, tiny_variables(model)), model)
  export_command.run(str(path), str(tmp_path / 'out'))
  assert (tmp_path / 'out' / 'tokenizer.model').exists()


def test_as_a_stage_export_writes_into_its_workdir_and_is_done_once(tmp_path):
  config = runs.load_experiment('experiments/r1_zero.py')
  config.stage = 'export'
  summary = launch(config, tmp_path / 'run')
  assert summary['complete'] and summary['out'] == str(tmp_path / 'run' / 'export')
  assert {str(t.dtype) for t in read_folder(tmp_path / 'run' / 'export').values()} == {'float32'}
  assert_same_bits(flat(load_model(tmp_path / 'run' / 'export')[1]), flat(load_model('embedded')[1]))
  assert launch(config, tmp_path / 'run') == summary
  config.model.param_dtype = 'bfloat16'
  with pytest.raises(ValueError, match='belongs to another config: use another workdir'):
    launch(config, tmp_path / 'run')
  config.init_from = ''
  with pytest.raises(ValueError, match='config.init_from is empty: name the weights to export'):
    launch(config, tmp_path / 'other')


def test_the_export_stage_lists_its_programs(mesh):
  config = runs.load_experiment('experiments/r1_zero.py')
  config.stage = 'export'
  programs = Export(config, mesh).programs()
  assert {program.name.removeprefix('take ') for program in programs} == set(shapes(Export(config, mesh).model))
  assert programs[0].lower().compile().memory_analysis() is not None


def test_no_space_left_while_exporting_leaves_nothing_behind_and_says_how_much_is_needed(tmp_path):
  """A real failure: files of this process may not grow beyond 30 kB."""
  source, out = write_hub(tmp_path / 'hub', LLAMA), tmp_path / 'new' / 'out'
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
  try:
    with pytest.raises(ValueError) as error:
      export_command.run(str(source), str(out))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert list(tmp_path.iterdir()) == [source]
  size = sum(tensor.nbytes for tensor in read_folder(source).values())
  for part in (str(out), 'cannot be written (File too large)', f'it needs {size:,} bytes', 'choose another folder'):
    assert part in str(error.value)
  export_command.run(str(source), str(out))  # the same again, with room


def test_an_export_that_will_not_fit_is_refused_before_it_begins(tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1000))
  with pytest.raises(ValueError, match='needs 3,106,400 bytes, 1,000 are free there'):
    export_command.run('embedded', str(tmp_path / 'out'))
  assert list(tmp_path.iterdir()) == []


def test_exports_that_would_overwrite_or_mix_are_refused_at_once(tmp_path, capsys):
  source = write_hub(tmp_path / 'hub', LLAMA)
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'thing').write_text('')
  (tmp_path / 'left.partial').mkdir()
  (tmp_path / 'empty').mkdir()
  for out, part in (('full', 'is there already'), ('left', 'left.partial')):
    assert export_command.main([f'--init_from={source}', f'--out={tmp_path / out}']) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and part in said and 'Traceback' not in said
  assert export_command.main([f'--init_from={source}', f'--out={tmp_path / "empty"}']) == 0
  assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'full', 'hub', 'left.partial']


def test_a_tokenizer_larger_than_the_embedding_or_unreadable_is_refused_before_anything_is_written(tmp_path):
  source = write_hub(tmp_path / 'hub', LLAMA)
  with pytest.raises(ValueError, match=r'its vocabulary \(3\d\d\) is larger than the embedding .* \(80 rows\)'):
    export_command.run(str(source), str(tmp_path / 'out'), tokenizer='tiny')
  with pytest.raises(ValueError, match='setup.py: not a sentencepiece model'):
    export_command.run(str(source), str(tmp_path / 'out'), tokenizer='setup.py')
  assert not (tmp_path / 'out').exists()


def test_a_model_of_no_family_is_refused_with_the_field(tmp_path):
  model = tiny_model(score='softmax', norm_top_k=True)
  save_weights(tmp_path / 'a.safetensors', tiny_variables(model), own_fields(model))
  with pytest.raises(ValueError, match='config.model.norm_top_k: no Hugging Face family holds such a model'):
    export_command.run(str(tmp_path / 'a.safetensors'), str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('changes', [dict(mtp_layers=1, q_lora=24), dict(
  attention='gqa', kv_heads=1, head_dim=16, qkv_bias=True, tied=True, kv_lora=0, nope_dim=0, rope_dim=0, v_dim=0,
  experts=0, dense_layers=3)])
def test_transformers_loads_an_export_as_it_is(changes, tmp_path, take):
  torch = pytest.importorskip('torch', reason='the reference needs torch, which is not installed here')
  transformers = pytest.importorskip('transformers', reason='transformers, the reference, is not installed here')
  model = tiny_model(**changes)
  variables = jax.device_put(tiny_variables(model))
  hf_export.export(model, variables, tmp_path / 'out', take=take, form='float32', shard_bytes=40_000)
  reference, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', dtype=torch.float32, output_loading_info=True)
  assert not info['missing_keys'] and not info['mismatched_keys']
  assert all(name.startswith('model.layers.3.') for name in info['unexpected_keys'])  # the prediction layer
  ids = np.arange(24, dtype=np.int32).reshape(2, 12) * 5 % 64
  with torch.no_grad():
    wanted = reference(torch.tensor(ids, dtype=torch.long)).logits.numpy()
  net, places = Transformer(model), np.broadcast_to(np.arange(12, dtype=np.int32), ids.shape)

  def logits(variables):
    hidden = net.apply(variables, ids, places, np.ones_like(ids)).hidden_NxTxD
    return net.apply(variables, hidden, method=net.logits)
  # float32 in another order of sums: 1e-5 seen, over logits of several units.
  np.testing.assert_allclose(quick_jit(logits)(variables), wanted, rtol=0, atol=2e-4)


# Inspect.


def test_inspect_prints_family_config_sizes_and_bytes(tmp_path, capsys):
  folder = write_hub(tmp_path / 'hub')
  assert inspect_command.main([str(folder)]) == 0
  lines = dict(re.split(r' {2,}', line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
  assert lines['family'] == 'deepseek_v3' and lines['missing'] == lines['superfluous'] == lines['wrong'] == 'none'
  model = open_checkpoint(folder).model
  assert {k.removeprefix('model.'): v for k, v in lines.items() if k.startswith('model.')} == {
    k: str(v) for k, v in own_fields(model).items()}
  whole = {n: math.prod(t.shape) for n, t in read_folder(folder).items() if '.layers.3.' not in n}
  idle = 2 * 5 * 3 * 32 * 16  # two layers with experts, of whose 8 a token passes 3
  assert lines['parameters'] == f'{sum(whole.values()):,} in all, {sum(whole.values()) - idle:,} active a token'
  assert lines['bytes float32'] == f'{3 * 8 * 4:,}'  # the selection biases


def test_inspect_names_what_is_missing_and_superfluous_and_ends_with_1(tmp_path, capsys):
  folder = write_hub(tmp_path / 'hub', LLAMA)
  tensors = tensors_of(folder)
  tensors.pop(Q_PROJ)
  rewrite(folder, tensors | {'mystery': np.zeros(2, np.float32)})
  assert inspect_command.main([str(folder)]) == 1
  said = capsys.readouterr().out
  assert re.search(rf'missing +1\n +{Q_PROJ}\nsuperfluous +1\n +mystery\n', said)
  assert inspect_command.main([str(tmp_path / 'nothing')]) == 2
  assert 'there is no such file or folder' in capsys.readouterr().err


@pytest.mark.parametrize('kind', ['file', 'run'])
def test_inspect_reads_our_own_kinds(kind, tmp_path, capsys):
  model = tiny_model()
  variables = jax.tree.map(jax.numpy.asarray, tiny_variables(model))
  path = tmp_path / 'a.safetensors'
  if kind == 'run':
    path = saved_run(tmp_path / 'run', variables, model)
  else:
    save_weights(path, variables, own_fields(model))
  assert inspect_command.main([str(path)]) == 0
  said = capsys.readouterr().out
  assert 'deepseek_v3' in said and f'{sum(x.size for x in jax.tree.leaves(variables)):,} in all' in said


def test_active_parameters_are_those_of_the_released_descriptions():
  """Both embeddings included; DeepSeek counts one of V3's: 36.7 billion, which is said to three digits."""
  v3, v2, moonlight = (inspect_command.active_parameters(preset(name))
                       for name in ('v3_671b', 'v2_lite_16b', 'moonlight_16b'))
  assert v3 - 129_280 * 7168 == pytest.approx(36.7e9, rel=3e-3)
  assert (v2, moonlight) == (pytest.approx(2.66e9, rel=3e-3), pytest.approx(2.91e9, rel=3e-3))
