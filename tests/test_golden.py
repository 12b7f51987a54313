"""Every family against the numbers that `transformers` gave for the same weights, kept in tests/data. No torch."""

import numpy as np
import pytest
from families import CASES, GOLDEN, assert_the_same, golden, ours

PREDICTION = next(iter(CASES))


def test_the_kept_numbers_are_small_and_those_of_every_case():
  assert GOLDEN.stat().st_size < 600_000
  for case, config in CASES.items():
    assert golden(case)['config'].items() >= {k: v for k, v in config.items() if not k.startswith('rope_')}.items()


@pytest.mark.parametrize('case', CASES)
def test_logits_gradients_and_greedy_tokens_are_the_references(case):
  """Rows that are full, padded left and padded right; contexts beyond the original one."""
  assert len(np.unique(golden(case)['greedy'])) > 40  # the answers do not repeat themselves
  assert_the_same(ours(case), golden(case))


def test_the_prediction_module_is_the_references():
  own, wanted = ours(PREDICTION), golden(PREDICTION)['second']
  assert own.config.mtp_layers == 1 and wanted.shape == (39, 80)
  np.testing.assert_allclose(own.second, wanted, rtol=0, atol=2e-4)
  assert np.abs(wanted - golden(PREDICTION)['logits'][0, :-1]).max() > 1  # it is not the main model again
