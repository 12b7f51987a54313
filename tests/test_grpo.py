"""GRPO's pure functions against numbers worked out by hand, and the identities that tie its variants together."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rl.rl import grpo

# Rewards as the rule-based functions give them, weighted; several of them have no exact float32.
REWARDS = st.sampled_from([-1.0, 0.0, 0.1, 0.7, 1.0, 1.1, 2.0])
GROUPS = st.integers(2, 16).flatmap(lambda g: st.lists(
  st.lists(REWARDS, min_size=g, max_size=g), min_size=1, max_size=4)).map(lambda r: np.array(r, np.float32))
examples = hypothesis.settings(max_examples=100, deadline=None, derandomize=True)

_loss_and_gradient = jax.jit(jax.value_and_grad(grpo.policy_loss))  # compiled once for all examples
_kl = jax.jit(grpo.kl_k3)


# Advantages.


def test_advantage_is_the_distance_from_the_group_mean_in_standard_deviations():
  # Group one: mean 0.5, deviations +-0.5, population standard deviation 0.5. Group two: mean 1, deviations -1, -1,
  # -1, 3, variance 12/4, standard deviation sqrt 3.
  got = grpo.group_advantage(np.array([[1, 0, 0, 1], [0, 0, 0, 4]], np.float32))
  third = 1 / math.sqrt(3)
  # 1e-5: eps = 1e-6 in the divisor takes up to 2e-6 of the value.
  np.testing.assert_allclose(got, [[1, -1, -1, 1], [-third, -third, -third, 3 * third]], rtol=1e-5)
  assert got.dtype == np.float32


def test_without_the_standard_deviation_the_advantage_is_the_plain_distance():
  got = grpo.group_advantage(np.array([[1, 0, 0, 1], [0, 0, 0, 4]], np.float32), scale_by_std=False)
  np.testing.assert_array_equal(got, [[0.5, -0.5, -0.5, 0.5], [-1, -1, -1, 3]])


@pytest.mark.parametrize('scale_by_std', [True, False])
@pytest.mark.parametrize('reward', [0.0, 0.1, 0.7, 1.1])
@pytest.mark.parametrize('group', [2, 6, 7, 8, 16, 64])
def test_a_tied_group_such_as_eight_rewards_of_seven_tenths_has_exactly_no_advantage(group, reward, scale_by_std):
  # The float32 mean of seven 0.7s is not 0.7; over a standard deviation of that same rounding it would be an advantage.
  rewards = np.full((2, group), reward, np.float32)
  rewards[1, -1] += 1
  got = grpo.group_advantage(rewards, scale_by_std=scale_by_std)
  np.testing.assert_array_equal(got[0], np.zeros(group))
  assert (got[1] != 0).all()
  np.testing.assert_array_equal(grpo.tied_groups(rewards), [True, False])


def test_some_means_of_equal_rewards_do_round_away_from_them():
  # Otherwise the test above would hold of any code.
  assert any(np.full((1, g), r, np.float32).mean(1)[0] != np.float32(r) for g in (6, 7, 64) for r in (0.1, 0.7, 1.1))


@examples
@hypothesis.given(GROUPS, st.booleans())
def test_advantages_of_a_group_have_mean_zero(rewards, scale_by_std):
  got = grpo.group_advantage(rewards, scale_by_std=scale_by_std)
  # Rewards up to 2 are rounded by 1.2e-7 at most; the smallest deviation of an untied group here is 0.1 in one of 16
  # answers, a standard deviation of 0.024, which magnifies that to 5e-6.
  np.testing.assert_allclose(got.mean(1), 0, atol=1e-5)


@examples
@hypothesis.given(GROUPS, st.randoms(use_true_random=False), st.booleans())
def test_shuffling_a_group_shuffles_its_advantages(rewards, random, scale_by_std):
  order = list(range(rewards.shape[1]))
  random.shuffle(order)
  got = grpo.group_advantage(rewards[:, order], scale_by_std=scale_by_std)
  wanted = grpo.group_advantage(rewards, scale_by_std=scale_by_std)[:, order]
  # The order of a sum changes its rounding: as above.
  np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize('shape', [(3, 1), (3, 0), (4,)])
def test_a_group_of_fewer_than_two_answers_is_refused(shape):
  with pytest.raises(ValueError, match='a group needs >= 2 answers, got shape'):
    grpo.group_advantage(np.ones(shape, np.float32))


@examples
@hypothesis.given(GROUPS)
def test_leave_one_out_advantage_is_dr_grpo_times_g_over_g_minus_one(rewards):
  group = rewards.shape[1]
  others = (rewards.sum(1, keepdims=True) - rewards) / (group - 1)  # RLOO: baseline from the other answers
  got = grpo.group_advantage(rewards, scale_by_std=False) * group / (group - 1)
  # Sums of 16 rewards up to 32, rounded by 1.9e-6 each way, over G - 1.
  np.testing.assert_allclose(got, rewards - others, atol=1e-5)


# The clipped loss. Old log-prob 0, so ratio = exp(logp).


def loss_and_gradient(ratio, advantage, low, high):
  """Loss of one token and its derivative by the log-prob, which is -ratio * advantage where nothing is clipped."""
  return _loss_and_gradient(math.log(ratio), 0.0, advantage, low, high)


@pytest.mark.parametrize('ratio, advantage, loss, gradient, is_clipped', [
  (1.1, 2.0, -2.2, -2.2, False),  # inside, good answer
  (0.9, -2.0, 1.8, 1.8, False),  # inside, bad answer
  (1.5, 2.0, -2.56, 0.0, True),  # good and already likelier by more than 0.28: held at 1.28
  (0.5, -2.0, 1.6, 0.0, True),  # bad and already rarer by more than 0.2: held at 0.8
  (0.5, 2.0, -1.0, -1.0, False),  # good but rarer: the minimum is the unclipped term, it must be able to return
  (1.5, -2.0, 3.0, 3.0, False),  # bad but likelier: likewise
  (1.5, 0.0, 0.0, 0.0, False),  # nothing to learn, nothing clipped
])
def test_clipping_takes_the_gradient_on_the_far_side_only(ratio, advantage, loss, gradient, is_clipped):
  got = loss_and_gradient(ratio, advantage, 0.2, 0.28)
  np.testing.assert_allclose(got, (loss, gradient), rtol=1e-6)  # a few float32 roundings of exp and log
  assert not is_clipped or float(got[1]) == 0
  assert bool(grpo.clipped(math.log(ratio), 0.0, advantage, 0.2, 0.28)) == is_clipped


@pytest.mark.parametrize('ratio, advantage, loss, gradient', [
  (10.9, 1.0, -10.9, -10.9), (11.1, 1.0, -11.0, 0.0), (1e-4, -1.0, 1e-4, 1e-4), (11.1, -1.0, 11.1, 11.1)])
def test_with_r1s_eps_of_ten_only_a_ratio_above_eleven_clips(ratio, advantage, loss, gradient):
  # 1 - 10 is negative, where no ratio is: the lower side is off.
  np.testing.assert_allclose(loss_and_gradient(ratio, advantage, 10.0, 10.0), (loss, gradient), rtol=1e-6)
  assert bool(grpo.clipped(math.log(ratio), 0.0, advantage, 10.0, 10.0)) == (ratio > 11 and advantage > 0)


def test_at_the_weights_that_sampled_the_gradient_is_minus_the_advantage():
  logp, advantage = jnp.array([-0.1, -3.0, -9.0]), jnp.array([1.5, -0.5, 0.0])
  got = jax.grad(lambda x: grpo.policy_loss(x, logp, advantage, 0.2, 0.2).sum())(logp)
  np.testing.assert_array_equal(got, -advantage)


def test_old_log_probs_and_advantages_carry_no_gradient():
  got = jax.grad(lambda old, a: grpo.policy_loss(-1.0, old, a, 0.2, 0.2), argnums=(0, 1))(-1.1, 0.7)
  assert got == (0.0, 0.0)


@examples
@hypothesis.given(st.floats(-1e3, 1e3, width=32), st.floats(-4, 4, width=32))
def test_loss_and_gradient_are_finite_whatever_the_log_ratio(log_ratio, advantage):
  assert np.isfinite(_loss_and_gradient(np.float32(log_ratio), np.float32(0), np.float32(advantage), 0.2, 0.28)).all()


# The KL estimate.


def test_kl_is_the_hand_computed_k3_and_its_gradient_pulls_toward_the_reference():
  # reference / pi = 2: 2 - ln 2 - 1; derivative by log pi: 1 - reference / pi.
  for ratio in (2.0, 0.5, 1.25):
    got = jax.value_and_grad(grpo.kl_k3)(jnp.float32(-1.0), jnp.float32(-1.0 + math.log(ratio)))
    np.testing.assert_allclose(got, (ratio - math.log(ratio) - 1, 1 - ratio), rtol=2e-6)


def test_kl_is_zero_with_zero_gradient_at_equality():
  logp = jnp.array([0.0, -0.3, -12.5])
  np.testing.assert_array_equal(grpo.kl_k3(logp, logp), 0)
  np.testing.assert_array_equal(jax.grad(lambda x: grpo.kl_k3(x, logp).sum())(logp), 0)


def test_the_reference_carries_no_gradient():
  assert jax.grad(grpo.kl_k3, argnums=1)(-1.0, -2.0) == 0


@examples
@hypothesis.given(st.floats(-60, 0, width=32), st.floats(-60, 0, width=32))
def test_kl_is_never_negative(logp, reference):
  assert _kl(np.float32(logp), np.float32(reference)) >= 0


@pytest.mark.parametrize('log_ratio', [1e3, -1e3, 89.0, -89.0])  # exp(89) is past float32
def test_kl_of_any_log_ratio_is_finite_with_a_finite_gradient(log_ratio):
  value, gradient = jax.value_and_grad(grpo.kl_k3)(jnp.float32(-log_ratio), jnp.float32(0))
  assert np.isfinite(value) and value > 0 and np.isfinite(gradient)


def test_the_mean_of_k3_over_samples_is_the_kl_divergence():
  # E under pi of reference / pi - log(reference / pi) - 1 = 1 + KL - 1, taken exactly over four outcomes.
  p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
  got = (p * np.asarray(grpo.kl_k3(jnp.log(p), jnp.log(q)))).sum()
  np.testing.assert_allclose(got, (p * np.log(p / q)).sum(), rtol=1e-6)


# What the means are over.


@pytest.mark.parametrize('denominator, wanted', [
  ('sequence', [1 / (3 * 2), 1 / (3 * 4), 1 / (3 * 10)]),  # 3 samples, each the mean of its own tokens
  ('token', [1 / 16] * 3),  # 2 + 4 + 10 tokens
  ('constant', [1 / (3 * 20)] * 3)])  # 3 samples x 20 tokens at most
def test_token_weights_are_the_named_means(denominator, wanted):
  got = grpo.token_weights(np.array([2, 4, 10]), denominator, 20)
  np.testing.assert_allclose(got, wanted, rtol=1e-7)
  assert got.dtype == np.float32


@examples
@hypothesis.given(st.lists(st.integers(1, 96), min_size=1, max_size=64))
def test_weights_sum_to_one_over_all_tokens_or_to_the_share_of_the_longest_possible(lengths):
  lengths = np.array(lengths)
  # float32 weights, each rounded by 6e-8 of itself, summed in float64.
  for denominator, total in (('sequence', 1), ('token', 1), ('constant', lengths.mean() / 96)):
    weights = grpo.token_weights(lengths, denominator, 96).astype(np.float64)
    np.testing.assert_allclose((weights * lengths).sum(), total, rtol=1e-6)


def test_a_longer_answer_weighs_as_much_by_sequence_and_more_by_token():
  lengths = np.array([5, 50])
  np.testing.assert_allclose(lengths * grpo.token_weights(lengths, 'sequence', 64), [0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(lengths * grpo.token_weights(lengths, 'token', 64), [5 / 55, 50 / 55], rtol=1e-6)


def test_an_unknown_denominator_is_refused_with_the_names_there_are():
  with pytest.raises(ValueError, match="loss_denominator 'tokens': use 'sequence', 'token' or 'constant'"):
    grpo.token_weights(np.array([1]), 'tokens', 4)


# The identity that ties GRPO to REINFORCE.


def test_one_update_without_std_and_with_a_constant_normaliser_is_reinforce_with_the_group_mean_as_baseline():
  # A softmax policy over 5 tokens at each of 6 positions; 2 prompts x 4 answers of 1 to 6 tokens, one policy for all.
  rng = np.random.default_rng(0)
  theta, max_new = rng.normal(size=(6, 5)).astype(np.float32), 6
  tokens, lengths = rng.integers(0, 5, (2, 4, 6)), rng.integers(1, 7, (2, 4))
  rewards = rng.choice(np.float32([0, 0.1, 1, 1.1]), (2, 4))

  def logps(theta):
    table = jax.nn.log_softmax(theta)
    return jnp.take_along_axis(jnp.broadcast_to(table, (2, 4, 6, 5)), tokens[..., None], -1)[..., 0]

  def loss(theta):
    advantage = grpo.group_advantage(rewards, scale_by_std=False)[..., None]
    weight = grpo.token_weights(lengths.reshape(-1), 'constant', max_new).reshape(2, 4, 1)
    answer = np.arange(6) < lengths[..., None]
    old = logps(jax.lax.stop_gradient(theta))
    return (weight * answer * grpo.policy_loss(logps(theta), old, advantage, 0.2, 0.28)).sum()

  # REINFORCE: the gradient of log softmax is one-hot minus probability; sum over tokens, mean over answers.
  p = np.exp(theta) / np.exp(theta).sum(1, keepdims=True)
  wanted = np.zeros_like(theta)
  for b in range(2):
    for g in range(4):
      for t in range(lengths[b, g]):
        wanted[t] -= (rewards[b, g] - rewards[b].mean()) * (np.eye(5)[tokens[b, g, t]] - p[t]) / (8 * max_new)
  # Sums of 8 terms of about 0.02 in float32.
  np.testing.assert_allclose(jax.grad(loss)(theta), wanted, rtol=1e-5, atol=1e-8)
