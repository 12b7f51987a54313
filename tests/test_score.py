"""The score command: what it writes is what the reference says, and bad input is refused before any compile."""

import re

import numpy as np
import pytest
from families import batch, golden, targets, write_checkpoint

from moe_rl import score
from moe_rl.runtime.run import CompileCounter

CASE = 'qwen3, tied'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return write_checkpoint(tmp_path_factory.mktemp('score'), golden(CASE)['config'], golden(CASE)['shapes'])


def command(checkpoint, folder, *more: str, **flags) -> list[str]:
  flags = dict(init_from=checkpoint, ids=folder / 'ids.npy', out=folder / 'out.npz') | flags
  return [f'--{k}={v}' for k, v in flags.items()] + list(more)


@pytest.mark.parametrize('pad_id', [0, -100])
def test_log_probs_and_logits_are_the_references_and_padding_is_zero(checkpoint, tmp_path, monkeypatch, capsys, pad_id):
  """In batches of two rows of 40, the last one half empty; the padding's id need not be in the vocabulary."""
  monkeypatch.setattr(score, 'BATCH_TOKENS', 80)
  ids, valid = batch()
  np.save(tmp_path / 'ids.npy', np.where(valid, ids, pad_id))
  assert score.main(command(checkpoint, tmp_path, '--logits', pad_id=pad_id)) == 0
  assert f'{targets(valid).sum()} log-probs of 3 rows, {golden(CASE)["logprobs"].sum() / 101:.4f} nats' in (
    capsys.readouterr().out)
  with np.load(tmp_path / 'out.npz') as out:
    assert sorted(out.files) == ['logits', 'logprobs']
    assert out['logits'].shape == (3, 40, 80) and out['logprobs'].shape == (3, 39)
    assert out['logits'].dtype == out['logprobs'].dtype == np.float32
    np.testing.assert_allclose(out['logits'], golden(CASE)['logits'], rtol=0, atol=2e-4)  # kept at 0 on padding too
    np.testing.assert_allclose(out['logprobs'], golden(CASE)['logprobs'], rtol=0, atol=1e-4)
  assert {p.name for p in tmp_path.iterdir()} == {'ids.npy', 'out.npz'}


def test_the_padding_id_within_a_row_is_a_token():
  ids = np.array([[9, 9, 1, 9, 2, 9], [9, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 6]])
  assert score.tokens(ids, 9).astype(int).tolist() == [[0, 0, 1, 1, 1, 0], [0] * 6, [1] * 6]
  assert score.tokens(ids, None).all()


BAD_IDS = {
  'floats': (np.ones((2, 4)), "ids.npy': holds float64, ids are integers: convert with .astype('int32')"),
  'one row without its axis': (np.ones(4, np.int32), "ids.npy': has shape [4], must be [N, L]"),
  'single tokens': (np.ones((3, 1), np.int32), "ids.npy': has shape [3, 1], must be [N, L]"),
  'outside the vocabulary': (np.full((2, 4), 80), "ids.npy': id 80 at [0, 0] is not in the vocabulary (0 to 79)"),
  'padding that is not named': (np.array([[5, 6, -1]]), 'id -1 at [0, 2] is not in the vocabulary'),
}


@pytest.fixture(scope='module')
def compiles():
  return CompileCounter()


@pytest.mark.parametrize('name', BAD_IDS)
def test_bad_ids_are_refused_before_any_compile(name, checkpoint, tmp_path, capsys, compiles):
  ids, words = BAD_IDS[name]
  np.save(tmp_path / 'ids.npy', ids)
  before = compiles.count
  assert score.main(command(checkpoint, tmp_path)) == 2
  assert re.search('^error: .*' + re.escape(words), capsys.readouterr().err)
  assert compiles.count == before and not (tmp_path / 'out.npz').exists()


def test_bad_paths_are_refused_by_name(checkpoint, tmp_path, capsys):
  np.save(tmp_path / 'ids.npy', np.ones((2, 4), np.int32))
  np.savez(tmp_path / 'two.npz', a=np.ones(2))
  (tmp_path / 'text.npy').write_text('1 2 3')
  for flags, words in ((dict(ids=tmp_path / 'absent.npy'), "absent.npy': there is no such file"),
                       (dict(ids=tmp_path / 'text.npy'), "text.npy': not a .npy file"),
                       (dict(ids=tmp_path / 'two.npz'), "two.npz': an archive of arrays: give a single one"),
                       (dict(out=tmp_path / 'no' / 'out.npz'), 'give the name of a .npz file in a folder that exists'),
                       (dict(out=tmp_path / 'out.txt'), 'give the name of a .npz file'),
                       (dict(init_from=tmp_path / 'absent'), 'there is no such file or folder')):
    assert score.main(command(checkpoint, tmp_path, **flags)) == 2
    assert words in capsys.readouterr().err
