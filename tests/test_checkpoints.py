"""Checkpoints of every kind: what is read from them, how a stage starts, and what is refused with its remedy."""

import dataclasses
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import runs
import safetensors.numpy
from hub import LLAMA, TIED, V2, assert_same_bits, flat, rewrite, saved_run, tensors_of, write_hub
from tiny import tiny_model, tiny_variables

from moe_rl.config import base_config
from moe_rl.models import fp8, hf_import
from moe_rl.models.checkpoints import open_checkpoint
from moe_rl.models.config import own_fields
from moe_rl.models.hf_import import load_model
from moe_rl.models.hf_names import SCALE
from moe_rl.models.safetensors_io import INDEX, SINGLE, write_folder
from moe_rl.models.weights import EMBEDDED, save_weights
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.mesh import HOST_MEMORY
from moe_rl.runtime.run import CompileCounter, Run
from moe_rl.runtime.state import copied, make_optimizer
from moe_rl.stages.pretrain import Pretraining
from moe_rl.stages.start import Start

# Kinds of checkpoints.


def test_the_embedded_base_and_files_of_ours_hold_what_was_saved(tmp_path):
  model = tiny_model(mtp_layers=1)
  variables = tiny_variables(model)
  save_weights(tmp_path / 'a.safetensors', variables, own_fields(model), dtype='float32')
  found, loaded = load_model(tmp_path / 'a.safetensors', remat='dots')
  assert found == dataclasses.replace(model, remat='dots')
  assert_same_bits(flat(loaded), flat(variables))
  found, loaded = load_model('embedded', mtp_layers=0)
  file = safetensors.numpy.load_file(EMBEDDED['embedded'])
  assert {k: v.shape for k, v in flat(loaded).items()} == {
    k: v.shape for k, v in file.items() if '/mtp/' not in k}
  for name, value in flat(loaded).items():
    np.testing.assert_array_equal(value, file[name].astype(np.float32))


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
  done = runs.finish(runs.start_python(HUB_IDS, HF_HOME=str(tmp_path), HF_HUB_OFFLINE='1'))
  found, error = done.stdout.strip().split('\n', 1)
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


def test_a_reference_in_host_memory_is_born_refreshed_and_restored_there(tmp_path, mesh):
  config, model = base_config('tiny'), tiny_model(layers=1, dense_layers=1)
  start = Start(config, model, make_optimizer(config, 10), mesh, reference=True, reference_memory='host')
  state = start.state()
  state = state.replace(reference=copied(jax.tree.map(jax.numpy.cos, state.params), state.reference))
  for step in (0, 1):
    run = Run(config, tmp_path / 'run')
    restored = run.restore(start.abstract)
    run.save(step, state, {})
    run.close()
  restored = restored[1]
  for at in (state, restored):
    assert {x.sharding.memory_kind for x in jax.tree.leaves(at.reference)} == {HOST_MEMORY}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(at.params)} == {'device'}
  assert_same_bits(flat(restored.reference), flat(state.reference))


def test_devices_that_reach_no_host_memory_are_told_by_key(mesh, monkeypatch):
  monkeypatch.setattr('moe_rl.runtime.mesh.HOST_MEMORY', 'attic')
  with pytest.raises(ValueError, match="config.rl.reference_memory 'host': the cpu devices .* set it to 'device'"):
    meshes.in_host_memory({'w': meshes.everywhere(mesh)})


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
