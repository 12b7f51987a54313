"""Every family against `transformers` itself, and the kept numbers against it. Needs torch; see .ci/run."""

import flax
import numpy as np
import pytest
from families import CASES, assert_the_same, batch, golden, ours, write_checkpoint

from moe_rl.models.hf_config import to_hf_config
from moe_rl.models.hf_import import load_model

WHY = 'the reference needs {} (.ci/run installs it on Python 3.11); tests/test_golden.py checks its kept numbers'
torch = pytest.importorskip('torch', reason=WHY.format('torch'))
pytest.importorskip('transformers', minversion='5.23', reason=WHY.format('transformers 5.23'))

from make_golden import forward, load, reference  # noqa: E402 (imports both)


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
  """(name, folder of its checkpoint, what the installed reference says of it)."""
  name = request.param
  folder = write_checkpoint(tmp_path_factory.mktemp('family'), golden(name)['config'], golden(name)['shapes'])
  return name, folder, reference(folder)


def test_logits_gradients_and_greedy_tokens_are_the_references_of_today(case):
  name, _, now = case
  assert_the_same(ours(name), now)


def test_the_kept_numbers_are_the_references_of_today(case):
  """Those that stand in for it where torch is absent. 5e-5: the reference's own rounding on another machine."""
  name, _, now = case
  kept = golden(name)
  token = kept['logits'] != 0
  np.testing.assert_allclose(now['logits'][token], kept['logits'][token], rtol=0, atol=5e-5)
  np.testing.assert_allclose(now['second'], kept['second'], rtol=0, atol=5e-5)
  np.testing.assert_array_equal(now['greedy'], kept['greedy'])
  assert now['gradients'] == pytest.approx(kept['gradients'], rel=1e-4)


def test_a_config_that_we_write_means_the_same_to_the_reference(case, tmp_path):
  name, _, now = case
  config = to_hf_config(ours(name).config, dtype='float32')
  model = load(write_checkpoint(tmp_path, config, golden(name)['shapes']))
  token = batch()[1]
  np.testing.assert_array_equal(forward(model).detach().numpy()[token], now['logits'][token])


def test_a_folder_that_the_reference_saved_is_imported_bit_for_bit(case, tmp_path):
  """In several shards with an index, as released models come; it leaves the prediction module out."""
  name, folder, _ = case
  load(folder).save_pretrained(tmp_path, max_shard_size='40KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  config, variables = load_model(tmp_path)
  assert config.mtp_layers == 0
  wanted = flax.traverse_util.flatten_dict(ours(name).variables, sep='/')
  got = flax.traverse_util.flatten_dict(variables, sep='/')
  assert got.keys() == {path for path in wanted if '/mtp/' not in path}
  for path, leaf in got.items():
    np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)
