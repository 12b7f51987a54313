"""Export and inspect: whole folders or none, which other programs load, and what a checkpoint is said to hold."""

import json
import math
import re
import resource
import shutil
import types

import jax
import numpy as np
import pytest
import runs
from hub import LLAMA, assert_same_bits, flat, rewrite, saved_run, tensors_of, write_hub
from tiny import tiny_model, tiny_variables

from moe_rl import export as export_command
from moe_rl import inspect as inspect_command
from moe_rl.main import launch
from moe_rl.models import hf_export
from moe_rl.models.checkpoints import open_checkpoint, shapes
from moe_rl.models.config import own_fields, preset
from moe_rl.models.hf_import import load_model
from moe_rl.models.safetensors_io import read_folder
from moe_rl.models.transformer import Transformer
from moe_rl.models.weights import EMBEDDED, save_weights
from moe_rl.stages.export import Export

Q_PROJ = 'model.layers.1.self_attn.q_proj.weight'


# Export.


def test_an_export_says_what_it_wrote_and_has_the_tokenizer_that_belongs_to_the_weights(tmp_path, capsys):
  out = tmp_path / 'deep' / 'out'
  assert export_command.main([f'--init_from={"embedded"}', f'--out={out}']) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['tensors'] == len(read_folder(out)) and said['bytes'] == sum(t.nbytes for t in read_folder(out).values())
  config = json.loads((out / 'config.json').read_text())
  assert (config['eos_token_id'], config['pad_token_id'], config['torch_dtype']) == (1, 0, 'bfloat16')
  assert json.loads((out / 'generation_config.json').read_text()) == {'eos_token_id': 1, 'pad_token_id': 0}
  assert (out / 'tokenizer.model').read_bytes() == (EMBEDDED['embedded'].parent / 'tiny_tokenizer.model').read_bytes()
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
  with pytest.raises(ValueError, match='needs 3,098,208 bytes, 1,000 are free there'):
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
  np.testing.assert_allclose(jax.jit(logits)(variables), wanted, rtol=0, atol=2e-4)


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
