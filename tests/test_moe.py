"""The router: who is chosen, with what weight, and how the load is kept even."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rl.models import moe
from moe_rl.models.config import preset


def router(**changes):
  """8 experts in 4 groups of 2; 2 groups are kept, 2 experts picked."""
  return preset('tiny', **{**dict(experts=8, groups=4, kept_groups=2, top_k=2, route_scale=2.5), **changes})


def dyadic_scores(tokens: int, experts: int = 8, seed: int = 0) -> np.ndarray:
  """Scores in (0, 1) that are multiples of 2^-10: adding multiples of 2^-10 to them is exact in float32."""
  return np.random.default_rng(seed).integers(1, 1024, (tokens, experts)).astype(np.float32) / 1024


def picks(score, bias, config) -> list[list[int]]:
  bias = None if bias is None else jnp.asarray(bias, jnp.float32)
  return np.sort(moe.choose(jnp.asarray(score, jnp.float32), bias, config), axis=-1).tolist()


SCORE = [[0.9, 0.1, 0.6, 0.5, 0.7, 0.2, 0.3, 0.4]]  # sums of the groups' two: 1.0, 1.1, 0.9, 0.7


def test_the_choice_is_the_hand_computed_one_within_the_best_groups():
  # Groups 0 and 1 are kept, so expert 4 (0.7, group 2) loses to expert 2 (0.6).
  assert picks(SCORE, np.zeros(8), router()) == [[0, 2]]
  assert picks(SCORE, np.zeros(8), router(top_k=3)) == [[0, 2, 3]]
  assert picks(SCORE, np.zeros(8), router(groups=1, kept_groups=1)) == [[0, 4]]
  # A bias of 0.5 on expert 7 lifts group 3 to 1.2 and itself to 0.9 (0.9 + bias; expert 0's group 1.0 is third).
  assert picks(SCORE, [0] * 7 + [0.5], router()) == [[2, 7]]


def test_without_a_bias_a_groups_worth_is_its_best_expert():
  """V2's rule: bests of 0.9, 0.6, 0.7 and 0.4 keep groups 0 and 2, where the sums of two keep 0 and 1."""
  assert picks(SCORE, None, router(score='softmax')) == [[0, 4]]


def test_gates_are_the_hand_computed_ones():
  picked = jnp.array([[0, 2]])
  score = jnp.array(SCORE)
  np.testing.assert_allclose(moe.gates(score, picked, router()), [[2.5 * 0.9 / 1.5, 2.5 * 0.6 / 1.5]], rtol=1e-6)
  np.testing.assert_allclose(moe.gates(score, picked, router(norm_top_k=False)), [[2.25, 1.5]], rtol=1e-6)


@pytest.mark.parametrize('scale', [1.0, 2.446, 2.5])
def test_normalised_gates_sum_to_the_route_scale(scale):
  config, score = router(route_scale=scale, top_k=4), dyadic_scores(200)
  gate = moe.gates(jnp.asarray(score), moe.choose(score, jnp.zeros(8), config), config)
  assert gate.shape == (200, 4) and (gate > 0).all()
  np.testing.assert_allclose(gate.sum(-1), scale, rtol=1e-6)  # a few float32 roundings


@pytest.mark.parametrize('constant', [-3.0, -0.75, -0.5, 0.25, 2.0])
@pytest.mark.parametrize('kept_groups', [2, 4])
def test_adding_a_constant_to_every_bias_changes_no_choice_and_no_gate(constant, kept_groups):
  """Bit for bit: all sums are exact. A bias below -1 makes every score + bias negative."""
  config, score = router(kept_groups=kept_groups, top_k=3), dyadic_scores(500)
  bias = np.random.default_rng(1).integers(-256, 256, 8).astype(np.float32) / 1024
  before, after = moe.choose(score, bias, config), moe.choose(score, bias + np.float32(constant), config)
  np.testing.assert_array_equal(after, before)
  np.testing.assert_array_equal(moe.gates(score, after, config), moe.gates(score, before, config))


def test_negative_biases_never_let_a_dropped_group_win():
  """Masking with 0 instead of -inf would choose from the groups that were dropped: 0 > 0.9 - 2."""
  config, bias = router(), np.full(8, -2.0)
  select = np.array(SCORE) + bias
  masked_with_zero = np.where(np.arange(8) < 4, select, 0)
  assert (np.argsort(-masked_with_zero[0])[:2] >= 4).all()
  assert picks(SCORE, bias, config) == [[0, 2]]


@pytest.mark.parametrize('score_kind', ['sigmoid', 'softmax'])
def test_the_choice_never_leaves_the_kept_groups(score_kind):
  config = router(experts=24, groups=6, kept_groups=2, top_k=5, score=score_kind)
  score = dyadic_scores(300, experts=24)
  bias = np.random.default_rng(2).normal(0, 2, 24).astype(np.float32) if score_kind == 'sigmoid' else None
  select = (score if bias is None else score + bias).reshape(300, 6, 4)
  worth = np.sort(select, axis=-1)[..., -2:].sum(-1) if score_kind == 'sigmoid' else select.max(-1)
  picked = np.asarray(moe.choose(score, bias, config))
  for n in range(300):
    groups = set(picked[n] // 4)
    assert len(set(picked[n])) == 5
    # The better of the kept ones holds at most 4 of 5 picks, so both are used, and no dropped group is worth more.
    assert len(groups) == 2 and min(worth[n, list(groups)]) >= np.sort(worth[n])[-2]


def test_a_bias_changes_who_is_chosen_and_never_the_gate_of_an_expert():
  config, score = router(norm_top_k=False, route_scale=1.0), dyadic_scores(400)
  bias = np.array([0.3, 0, 0, 0, 0, 0, 0, -0.3], np.float32)
  picked = moe.choose(score, bias, config)
  plain = moe.choose(score, jnp.zeros(8), config)
  count, plain_count = (np.bincount(np.ravel(p), minlength=8) for p in (picked, plain))
  assert count[0] > 1.3 * plain_count[0] and count[7] < 0.7 * plain_count[7]
  np.testing.assert_array_equal(moe.gates(score, picked, config), np.take_along_axis(score, picked, -1))
  # Normalised gates too come from the scores alone: their ratios are those of the scores.
  normed = moe.gates(score, picked, router())
  own = np.take_along_axis(score, picked, -1)
  np.testing.assert_allclose(normed[:, 0] / normed[:, 1], own[:, 0] / own[:, 1], rtol=1e-6)


class TestBalanceLoss:
  """f_i = E / (K T) x the tokens that pick i, P_i = mean share of i; sum_i f_i P_i."""

  config = router(experts=4, groups=1, kept_groups=1)
  # Shares of the two tokens: (0.4, 0.3, 0.2, 0.1) and (0.4, 0.1, 0.3, 0.2), so P = (0.4, 0.2, 0.25, 0.15).
  # Picks: {0, 1} and {0, 2}, so f = (2, 1, 1, 0).
  score = np.array([[0.8, 0.6, 0.4, 0.2], [0.4, 0.1, 0.3, 0.2]], np.float32)

  def loss(self, score, valid=None):
    score = jnp.asarray(score, jnp.float32)
    valid = jnp.ones(score.shape[:2], bool) if valid is None else jnp.asarray(valid)
    return moe.balance_loss(score, valid, self.config)

  def test_it_is_the_hand_computed_one(self):
    assert float(self.loss(self.score[None])) == pytest.approx(2 * 0.4 + 0.2 + 0.25, rel=1e-6)

  def test_even_routing_gives_one_and_one_sided_routing_more(self):
    even = np.stack([np.roll([0.9, 0.8, 0.1, 0.2], 2 * t) for t in range(6)])
    assert float(self.loss(even[None])) == pytest.approx(1, rel=1e-6)
    one_sided = np.tile([0.9, 0.9, 0.1, 0.1], (6, 1))
    assert float(self.loss(one_sided[None])) == pytest.approx(2 * 0.9, rel=1e-6)

  def test_it_is_a_mean_over_sequences(self):
    both = np.stack([self.score, np.tile([0.9, 0.9, 0.1, 0.1], (2, 1))])
    assert float(self.loss(both)) == pytest.approx((1.25 + 1.8) / 2, rel=1e-6)

  def test_padding_and_rows_without_a_token_count_nothing(self):
    rng = np.random.default_rng(0)
    rows = np.concatenate([np.stack([self.score] * 2), rng.random((2, 3, 4))], axis=1)
    rows[1] = rng.random((5, 4))
    valid = np.array([[True] * 2 + [False] * 3, [False] * 5])
    assert float(self.loss(rows, valid)) == pytest.approx(1.25, rel=1e-6)
    assert not np.asarray(jax.grad(self.loss)(jnp.asarray(rows, jnp.float32), valid))[~valid].any()
    assert float(self.loss(rows, valid & False)) == 0

  def test_its_gradient_flows_through_the_shares_only(self):
    """d/ds_i sum_j f_j s_j / S = (f_i - sum_j f_j s_j / S) / S, over T; f is a count."""
    total = self.score.sum(-1, keepdims=True)
    f = np.array([2, 1, 1, 0])
    by_hand = (f - (f * self.score / total).sum(-1, keepdims=True)) / total / 2
    np.testing.assert_allclose(jax.grad(self.loss)(self.score[None])[0], by_hand, rtol=1e-5, atol=1e-7)


def test_biases_move_by_the_rate_against_the_load():
  bias = jnp.array([[0.5, 0.0, -0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
  load = jnp.array([[10.0, 0.0, 4.0, 2.0], [3.0, 3.0, 3.0, 3.0]])  # means 4 and 3
  moved = moe.update_bias(bias, load, 0.001)
  np.testing.assert_allclose(moved, [[0.499, 0.001, -0.5, 0.001], [0, 0, 0, 0]], rtol=1e-6)


def test_a_whole_balance_step_moves_the_layers_biases_and_no_other():
  biases = {'moe': {'ff': {'bias': jnp.zeros((1, 4))}}, 'mtp': {'block': {'ff': {'bias': jnp.ones(4)}}}}
  load = jnp.array([[10.0, 0.0, 4.0, 2.0]])
  moved = moe.move_bias(biases, load, 0.1)
  np.testing.assert_allclose(moved['moe']['ff']['bias'], [[-0.1, 0.1, 0, 0.1]], rtol=1e-6)
  np.testing.assert_array_equal(moved['mtp']['block']['ff']['bias'], np.ones(4))
  assert moe.move_bias(biases, load, 0.0) is biases  # rate 0: the last 500B tokens of V3, and RL by default
  assert moe.move_bias({}, load, 0.1) == {}  # softmax routers have no bias


def test_repeated_updates_even_out_a_skewed_router():
  """Router logits favour some experts by up to 3; the fullest expert starts with over twice its share."""
  config = router(experts=16, groups=4, kept_groups=2, top_k=4)
  skew = jnp.linspace(-1.5, 1.5, 16)

  @functools.partial(jax.jit, static_argnames='rate')
  def simulate(rate):
    def step(bias, key):
      score = jax.nn.sigmoid(jax.random.normal(key, (256, 16)) + skew)
      load = jnp.bincount(moe.choose(score, bias, config).reshape(-1), length=16).astype(jnp.float32)
      return moe.update_bias(bias, load, rate), load
    return jax.lax.scan(step, jnp.zeros(16), jax.random.split(jax.random.key(0), 300))
  bias, load = simulate(0.01)
  share = np.asarray(load) / (256 * 4 / 16)
  assert share[0].max() > 2 and share[0].min() < 0.2
  # An even load over 50 steps has a standard error of 2% of the share; the rate's own wobble adds as much.
  settled = share[-50:].mean(0)
  assert settled.max() < 1.1 and settled.min() > 0.9, settled
  assert bias[0] > 0 > bias[-1]
  _, load = simulate(0.0)
  assert np.asarray(load)[-50:].mean(0).max() / (256 * 4 / 16) > 2


def test_router_metrics_name_the_fullest_and_the_emptiest_expert_over_the_even_share():
  load = jnp.array([[4.0, 4.0, 4.0, 4.0], [8.0, 2.0, 5.0, 1.0]])
  metrics = moe.router_metrics({'moe': {'ff': {'bias': jnp.array([[0.1, -0.3]])}}}, load)
  assert {k: float(v) for k, v in metrics.items()} == pytest.approx({'load_max': 2, 'load_min': 0.25, 'bias_max': 0.3})
  assert moe.router_metrics({}, jnp.zeros((0, 0))) == {}
