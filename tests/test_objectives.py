"""The family of objectives: each name's loss and gradient against loops in float64, stored numbers, and the identities
between them; and that how a batch is laid out changes no gradient of any."""

import functools
import json
import math
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model, tiny_variables

from moe_rl.config import base_config
from moe_rl.models.transformer import Transformer
from moe_rl.rl import grpo
from moe_rl.rl.batch import PackedBatch, pack
from moe_rl.rl.objectives import ADVANTAGES, FINER, OBJECTIVES, Objective, chosen
from moe_rl.rl.sampler import Rollout
from moe_rl.rl.update import score

GOLDEN = pathlib.Path(__file__).parent / 'data' / 'golden_objectives.json'
every_objective = pytest.mark.parametrize('name', OBJECTIVES)
examples = hypothesis.settings(max_examples=50, deadline=None, derandomize=True)

# The rule: a name, and the keys that change it.


def rl(**changes):
  config = base_config().rl
  config.update(changes)
  return config


@every_objective
def test_a_name_alone_gives_its_row(name):
  assert chosen(rl(objective=name)) == OBJECTIVES[name]


@every_objective
def test_a_key_that_is_given_wins_over_the_row_and_the_others_stay(name):
  given = dict(advantage='group_mean', clip_low=0.11, clip_high=0.5, loss_denominator='constant', kl='k2',
               kl_weight=0.0, refill_rounds=0, overlong_filter=False)  # zeros and False are given too
  assert set(given) == set(FINER)
  for key, value in given.items():
    row, got = OBJECTIVES[name], chosen(rl(objective=name, **{key: value}))
    assert {k: getattr(got, k) for k in vars(row) if k != key} == {k: v for k, v in vars(row).items() if k != key}
    assert getattr(got, key) == value


def test_the_default_is_token_mean_group_std_clip_higher_and_a_thousandth_of_k3():
  assert chosen(base_config().rl) == Objective(
    advantage='group_std', ratio='token', surrogate='clip', clip_low=0.2, clip_high=0.28, loss_denominator='token',
    kl='k3', kl_weight=1e-3, refill_rounds=0, overlong_filter=False)


def test_the_rows_are_what_their_papers_publish():
  o = OBJECTIVES
  assert (o['grpo'].loss_denominator, o['grpo'].kl_weight) == ('sequence', 0.04)
  assert (o['grpo_sequence'].clip_high, o['grpo_sequence'].kl_weight) == (10, 0.001)
  assert (o['dr_grpo'].advantage, o['dr_grpo'].loss_denominator) == ('group_mean', 'constant')
  assert (o['dapo'].clip_low, o['dapo'].clip_high, o['dapo'].loss_denominator, o['dapo'].kl_weight) == (
    0.2, 0.28, 'token', 0)
  assert o['dapo'].refill_rounds > 0 and o['dapo'].overlong_filter
  assert (o['gspo'].clip_low, o['gspo'].clip_high, o['gspo'].kl_weight) == (3e-4, 4e-4, 0)
  assert 1 - o['cispo'].clip_low <= 0  # no ratio is below: the lower side is off


# Advantages. Group one: mean 1/2, standard deviation 1/2; group two: mean 1, standard deviation sqrt 3.

REWARDS = np.array([[1, 0, 0, 1], [0, 0, 0, 4]], np.float32)
LENGTHS = np.array([[2, 1, 1, 4], [1, 1, 1, 5]])  # 16 tokens; their mean reward is (2 + 4 + 20) / 16 = 1.625


@pytest.mark.parametrize('kind, wanted', [
  ('group_std', [[1, -1, -1, 1], np.array([-1, -1, -1, 3]) / math.sqrt(3)]),
  ('group_mean', [[0.5, -0.5, -0.5, 0.5], [-1, -1, -1, 3]]),
  ('leave_one_out', [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-4 / 3, -4 / 3, -4 / 3, 4]]),  # 1 - (0 + 0 + 1) / 3
  # Over tokens: 6 of reward 1, 5 of 0, 5 of 4; mean square 86/16, variance 86/16 - 1.625^2 = 2.734375.
  ('batch_std', (REWARDS - 1.625) / math.sqrt(2.734375)),
  # Centred by group: 6 tokens of 1/2, 2 of -1/2, 3 of -1, 5 of 3: mean 14/16, mean square 50/16.
  ('group_batch_std', (np.array([[0.5, -0.5, -0.5, 0.5], [-1, -1, -1, 3]]) - 0.875) / math.sqrt(3.125 - 0.875**2)),
])
def test_advantages_are_the_hand_computed_ones(kind, wanted):
  got = grpo.advantages(kind, REWARDS, LENGTHS)
  np.testing.assert_allclose(got, wanted, rtol=1e-5)  # eps = 1e-6 in the divisor takes up to 2e-6 of the value
  assert got.dtype == np.float32


@pytest.mark.parametrize('kind', ADVANTAGES)
def test_equal_rewards_give_exactly_no_advantage(kind):
  np.testing.assert_array_equal(grpo.advantages(kind, np.full((2, 7), 0.7, np.float32), np.ones((2, 7), int)), 0)


@examples
@hypothesis.given(st.integers(2, 12).flatmap(lambda g: st.lists(
  st.sampled_from([-1.0, 0.0, 0.1, 0.7, 1.1, 2.0]), min_size=2 * g, max_size=2 * g)))
def test_leave_one_out_is_g_over_g_minus_one_times_dr_grpo_and_the_distance_from_the_others(rewards):
  rewards = np.array(rewards, np.float32).reshape(2, -1)
  group, length = rewards.shape[1], np.ones(rewards.shape, int)
  got = grpo.advantages('leave_one_out', rewards, length)
  # Sums of 12 rewards up to 24, rounded by 1.9e-6 each way.
  np.testing.assert_allclose(got, grpo.advantages('group_mean', rewards, length) * group / (group - 1), atol=1e-5)
  np.testing.assert_allclose(got, rewards - (rewards.sum(1, keepdims=True) - rewards) / (group - 1), atol=1e-5)


def test_answers_left_out_do_not_count_in_the_whitening():
  lengths = np.array([[2, 1, 1, 4], [1, 1, 1, 0]])
  got = grpo.advantages('batch_std', REWARDS, lengths)  # 6 tokens of 1, 5 of 0
  mean = 6 / 11
  np.testing.assert_allclose(got[0], (REWARDS[0] - mean) / math.sqrt(mean - mean**2), rtol=1e-5)
  np.testing.assert_array_equal(grpo.advantages('batch_std', REWARDS, np.zeros((2, 4), int)), 0)


def test_an_unknown_advantage_is_refused_with_the_names_there_are():
  with pytest.raises(ValueError, match="advantage 'std': use one of group_std, group_mean, leave_one_out"):
    grpo.advantages('std', REWARDS, LENGTHS)


# Dynamic sampling.


@pytest.mark.parametrize('tied, wanted, chosen_groups', [
  ([0, 0, 0], 3, [0, 1, 2]), ([1, 1, 1], 3, [0, 1, 2]),  # one round that is as it is
  ([1, 0, 1, 0, 0, 1], 3, [1, 3, 4]),  # enough differ: they are taken, whenever they came
  ([1, 0, 0, 0, 0, 0], 3, [1, 2, 3]),  # more than enough: the first ones
  ([1, 0, 1, 1, 1, 1], 3, [0, 1, 2]),  # too few: tied ones fill up, the first ones
])
def test_a_step_takes_untied_groups_first_and_keeps_their_order(tied, wanted, chosen_groups):
  np.testing.assert_array_equal(grpo.fill(np.array(tied, bool), wanted), chosen_groups)


def test_fewer_groups_than_wanted_are_refused():
  with pytest.raises(ValueError, match='2 groups cannot fill a step of 3'):
    grpo.fill(np.zeros(2, bool), 3)


# Levels of the ratio, on a row with two answers (prompts of 2 and 1), and one with one and padding.

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0, 0]])
ANSWER = np.array([[0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0, 0]], bool)
X = np.array([[9, 9, 1, 2, 9, 3, 4, 5], [9, 1, 1, 2, 4, 9, 9, 9]], np.float32)


@pytest.mark.parametrize('level, wanted', [
  ('sequence', [[0, 0, 3, 3, 0, 12, 12, 12], [0, 8, 8, 8, 8, 0, 0, 0]]),
  ('sequence_mean', [[0, 0, 1.5, 1.5, 0, 4, 4, 4], [0, 2, 2, 2, 2, 0, 0, 0]]),
  ('token', X)])
def test_an_answers_sum_or_mean_stands_at_each_of_its_tokens(level, wanted):
  got = jax.jit(functools.partial(grpo.at_level, level=level))(X, ANSWER, SEGMENTS)
  np.testing.assert_array_equal(got, wanted)


# KL estimates, over four outcomes taken exactly.

P, Q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
THETA = np.log(P)


def expected(kl):
  """(E under softmax(THETA) of the estimate, its gradient by theta): what a mean over sampled tokens tends to."""
  return jax.jit(jax.value_and_grad(lambda theta: (P * kl(jax.nn.log_softmax(theta), np.log(Q))).sum()))(THETA)


@pytest.mark.parametrize('name, value', [
  ('k1', (P * np.log(P / Q)).sum()), ('k3', (P * np.log(P / Q)).sum()),  # unbiased
  ('k2', (P * np.log(P / Q)**2).sum() / 2)])
def test_the_mean_of_an_estimate_over_samples(name, value):
  np.testing.assert_allclose(expected(grpo.KL[name])[0], value, rtol=1e-6)


@pytest.mark.parametrize('name, divergence', [
  ('k1', lambda theta: (jax.nn.softmax(theta) * (jax.nn.log_softmax(theta) - jnp.log(Q))).sum()),
  ('k2', lambda theta: (jax.nn.softmax(theta) * (jax.nn.log_softmax(theta) - jnp.log(Q))).sum()),
  ('k3', lambda theta: (Q * (jnp.log(Q) - jax.nn.log_softmax(theta))).sum())])  # the other direction
def test_the_mean_gradient_is_that_of_the_divergence_that_the_docstring_names(name, divergence):
  got = expected(grpo.KL[name])[1]
  wanted = jax.jit(jax.grad(divergence))(THETA)
  np.testing.assert_allclose(got, wanted, atol=1e-6)  # float32 sums of numbers up to 1
  assert np.abs(got).max() > 0.1


def test_the_plain_derivative_of_k1_would_penalise_nothing():
  np.testing.assert_allclose(expected(lambda logp, reference: logp - reference)[1], 0, atol=1e-6)


@functools.cache
def kl_and_slopes(name: str):
  """(logp, reference) -> (estimate, (derivative by logp, by reference))."""
  both = jax.jit(jax.value_and_grad(grpo.KL[name], argnums=(0, 1)))
  return lambda *logps: both(*map(np.float32, logps))


@pytest.mark.parametrize('name, value, gradient', [
  ('k1', math.log(2), math.log(2)), ('k2', math.log(2)**2 / 2, math.log(2)), ('k3', 0.5 - math.log(0.5) - 1, 0.5)])
def test_estimates_at_twice_the_references_probability(name, value, gradient):
  # k3: reference / pi = 1/2; its derivative is 1 - reference / pi.
  estimate = kl_and_slopes(name)
  got = jax.tree.leaves(estimate(-1, -1 - math.log(2)))
  np.testing.assert_allclose(got, (value, gradient, 0), rtol=2e-6)  # the reference carries no gradient
  np.testing.assert_array_equal(jax.tree.leaves(estimate(-1, -1)), 0)


@pytest.mark.parametrize('name', grpo.KL)
@pytest.mark.parametrize('apart', [1e3, -1e3, 89.0, -89.0])  # exp(89) is past float32
def test_no_estimate_overflows(name, apart):
  assert np.isfinite(jax.tree.leaves(kl_and_slopes(name)(apart, 0))).all()


# Importance weights. w by token: 2, 1/2, 4 | 1, 1/8; the answers' geometric means: 4^(1/3) = 1.59 and 8^(-1/2) = 0.35.

W = np.array([[1, 2, 0.5, 4, 1, 1, 0.125]], np.float32)
W_SEGMENTS, W_ANSWER = np.array([[1, 1, 1, 1, 2, 2, 2]]), np.array([[0, 1, 1, 1, 0, 1, 1]], bool)


@functools.cache
def importance(kind: str):
  """(trainer's log-probs, sampler's, low, high) -> (gradient of the weights' sum by the trainer's, weights)."""
  def total(trainer, sampler, low, high):
    w = grpo.importance_weights(trainer, sampler, W_ANSWER, W_SEGMENTS, kind, low, high)
    return w.sum(), w
  return jax.jit(jax.grad(total, has_aux=True))


@pytest.mark.parametrize('kind, low, high, wanted', [
  ('none', 0.5, 2.0, [1, 1, 1, 1, 1]),
  ('truncate', 0.5, 2.0, [2, 0.5, 2, 1, 0.125]),  # the lower end plays no part
  ('mask', 0.45, 2.1, [2, 0.5, 0, 1, 0]),
  ('mask_sequence', 0.5, 2.0, [2, 0.5, 4, 0, 0]),
  ('mask_sequence', 0.3, 1.5, [0, 0, 0, 1, 0.125])])
def test_importance_weights_are_the_hand_computed_ones(kind, low, high, wanted):
  got = np.asarray(importance(kind)(np.log(W) - 3, np.full_like(W, -3), low, high)[1])
  np.testing.assert_allclose(got[W_ANSWER], wanted, rtol=1e-6)


@pytest.mark.parametrize('kind', ['truncate', 'mask', 'mask_sequence'])
def test_importance_weights_carry_no_gradient_and_never_overflow(kind):
  far = np.array([[0, 200, 0.1, -200, 0, 0.2, 0.3]], np.float32)
  gradient, weights = importance(kind)(far, np.zeros_like(W), 0.5, 2.0)
  assert np.isfinite(weights).all() and not np.any(gradient)


def test_an_unknown_kind_of_importance_is_refused():
  with pytest.raises(ValueError, match="importance 'tis': use 'none', 'truncate', 'mask' or 'mask_sequence'"):
    grpo.importance_weights(W, W, W_ANSWER, W_SEGMENTS, 'tis', 0.5, 2.0)


# Each objective, whole: two prompts, three answers each, of 1 to 4 tokens; log-probs chosen by hand.

REWARD = [[1.0, 0.0, 0.1], [0.0, 2.0, 0.0]]
LENGTH = [[3, 2, 4], [2, 1, 4]]
MAX_NEW = 5
LOGP = [[[-0.3, -1.7, -0.9], [-2.2, -0.4], [-1.1, -0.6, -3.0, -0.2]], [[-0.8, -1.4], [-1.9], [-0.7, -2.5, -0.1, -1.3]]]
OLD = [[[-0.9, -1.5, -1.1], [-2.0, -0.9], [-1.2, -0.3, -3.3, -0.6]], [[-0.9, -1.5], [-1.4], [-0.2, -2.6, -0.1, -1.0]]]
REFERENCE = [[[-0.5, -1.0, -1.6], [-2.4, -0.2], [-0.8, -0.9, -2.2, -0.5]],
             [[-1.1, -1.2], [-1.8], [-0.9, -2.9, -0.3, -0.8]]]


def plain_advantages(kind):
  """By loops over lists."""
  centred = []
  for row in REWARD:
    mean = sum(row) / 3
    deviation = math.sqrt(sum((x - mean)**2 for x in row) / 3)
    if kind == 'leave_one_out':
      centred.append([x - (sum(row) - x) / 2 for x in row])
    else:
      centred.append([(x - mean) / (deviation + 1e-6) if kind == 'group_std' else x - mean for x in row])
  if not kind.endswith('batch_std'):
    return centred
  values = REWARD if kind == 'batch_std' else centred
  whole = [x for row, n in zip(values, LENGTH, strict=True) for x, k in zip(row, n, strict=True) for _ in range(k)]
  mean = sum(whole) / len(whole)
  deviation = math.sqrt(sum((x - mean)**2 for x in whole) / len(whole))
  return [[(x - mean) / (deviation + 1e-6) for x in row] for row in values]


def plain_loss(o: Objective):
  """(loss, its derivative by each log-prob) in float64, written out token by token and differentiated by hand."""
  advantage, loss, gradient = plain_advantages(o.advantage), 0.0, []
  for b in range(2):
    for g in range(3):
      logp, old, reference, n = LOGP[b][g], OLD[b][g], REFERENCE[b][g], LENGTH[b][g]
      a = advantage[b][g]
      weight = {'sequence': 1 / 6 / n, 'token': 1 / 16, 'constant': 1 / 6 / MAX_NEW}[o.loss_denominator]
      d, away = [x - y for x, y in zip(logp, old, strict=True)], [x - y for x, y in zip(logp, reference, strict=True)]
      own = 1.0  # derivative of the level's log-ratio by one of its log-probs
      if o.ratio != 'token':
        own = 1.0 if o.ratio == 'sequence' else 1 / n
        d = [sum(d) * own] * n
      if o.ratio == 'sequence':
        away = [sum(away)] * n
      slopes = []
      for t in range(n):
        ratio = math.exp(d[t])
        held = min(max(ratio, 1 - o.clip_low), 1 + o.clip_high)
        if o.surrogate == 'weight':
          value, slope = -held * a * logp[t], -held * a
        else:
          stuck = (a > 0 and ratio > held) or (a < 0 and ratio < held)
          value, slope = (-held * a, 0.0) if stuck else (-ratio * a, -ratio * a)
        kl, kl_slope = {'k1': (away[t], away[t]), 'k2': (away[t]**2 / 2, away[t]),
                        'k3': (math.exp(-away[t]) + away[t] - 1, 1 - math.exp(-away[t]))}[o.kl]
        loss += weight * (value + o.kl_weight * kl)
        slopes.append((weight * slope * own, weight * o.kl_weight * kl_slope))
      policy, kl = zip(*slopes, strict=True)
      if o.ratio != 'token':
        policy = [sum(policy)] * n
      if o.ratio == 'sequence':
        kl = [sum(kl)] * n
      gradient += [p + k for p, k in zip(policy, kl, strict=True)]
  return loss, gradient


def hand_batch(o: Objective, order=range(6), row_tokens=0):
  """The answers as a microbatch, each after a prompt of one token, as many to a row as fit in row_tokens (0: one).
  Returns (batch, logp, reference, where each answer's tokens lie)."""
  shape = (6, 24)
  ints = {k: np.zeros(shape, np.int32) for k in ('ids', 'positions', 'segments')}
  floats = {k: np.zeros(shape, np.float32) for k in ('weight', 'advantage', 'logp', 'new', 'reference')}
  length = np.array(LENGTH)
  advantage = grpo.advantages(o.advantage, np.array(REWARD, np.float32), length)
  weight = grpo.token_weights(length.reshape(-1), o.loss_denominator, MAX_NEW).reshape(2, 3)
  row, at, places = -1, row_tokens, {}
  for n in order:
    b, g = divmod(n, 3)
    if at + 1 + length[b, g] > row_tokens:
      row, at = row + 1, 0
    cells = (row, slice(at + 1, at + 1 + length[b, g]))
    ints['segments'][row, at:at + 1 + length[b, g]] = ints['segments'][row].max() + 1
    for name, values in (('weight', weight[b, g]), ('advantage', advantage[b, g]), ('logp', OLD[b][g]),
                         ('new', LOGP[b][g]), ('reference', REFERENCE[b][g])):
      floats[name][cells] = values
    places[n], at = cells, at + 1 + length[b, g]
  new, reference = floats.pop('new'), floats.pop('reference')
  batch = PackedBatch(**ints, **floats, importance=np.ones(shape, np.float32))
  return batch, new, reference, [places[n] for n in range(6)]


@functools.cache
def compiled(ratio: str, surrogate: str, kl: str):
  """One program for all objectives of this form: numbers are data."""
  def total(logp, reference, batch, low, high, kl_weight):
    o = Objective(ratio=ratio, surrogate=surrogate, kl=kl, clip_low=low, clip_high=high, kl_weight=kl_weight)
    return grpo.loss(o, logp, reference, batch)[0]
  return jax.jit(jax.value_and_grad(total))


def loss_and_gradient(o: Objective, logp, reference, batch):
  loss, gradient = compiled(o.ratio, o.surrogate, o.kl)(logp, reference, batch, o.clip_low, o.clip_high, o.kl_weight)
  return float(loss), np.asarray(gradient)


def compute(o: Objective, **layout):
  """(loss, its derivative by each log-prob in the order of the lists)."""
  batch, logp, reference, places = hand_batch(o, **layout)
  value, gradient = loss_and_gradient(o, logp, reference, batch)
  at_answers = np.concatenate([gradient[cells] for cells in places])
  assert np.count_nonzero(gradient) == np.count_nonzero(at_answers)  # prompts and padding have none
  return value, at_answers


@every_objective
def test_loss_and_gradient_are_those_of_loops_over_tokens(name):
  loss, gradient = compute(OBJECTIVES[name])
  wanted, slopes = plain_loss(OBJECTIVES[name])
  # float32 exp and sums of 16 terms of about 0.1: 1e-7 each.
  assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-6)
  np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-7)


@every_objective
def test_loss_and_gradient_are_the_stored_ones(name):
  golden = json.loads(GOLDEN.read_text())[name]
  loss, gradient = compute(OBJECTIVES[name])
  assert loss == pytest.approx(golden['loss'], rel=1e-5, abs=1e-6)  # as above
  np.testing.assert_allclose(gradient, golden['gradient'], rtol=1e-5, atol=1e-7)


def test_the_stored_numbers_tell_the_objectives_apart():
  golden = json.loads(GOLDEN.read_text())
  assert list(golden) == list(OBJECTIVES)
  vectors = np.array([entry['gradient'] for entry in golden.values()])
  apart = np.abs(vectors[:, None] - vectors).max(-1) + np.eye(len(vectors))
  assert apart.min() > 5e-5  # a hundred times the tolerance; the least: the default's KL term, which DAPO has not


@every_objective
@pytest.mark.parametrize('kl', grpo.KL)
def test_every_objective_takes_every_estimator(name, kl):
  o = chosen(rl(objective=name, kl=kl, kl_weight=0.5))
  loss, gradient = compute(o)
  wanted, slopes = plain_loss(o)
  assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-6)
  np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-6)


@every_objective
def test_the_order_of_samples_and_the_rows_they_share_change_no_bit_of_a_tokens_gradient(name):
  o = chosen(rl(objective=name, kl_weight=0.5))
  _, alone = compute(o)
  for order, row_tokens in ((range(6), 24), ((5, 2, 0, 3, 1, 4), 11)):  # all in one row; in rows of two
    _, packed = compute(o, order=order, row_tokens=row_tokens)
    np.testing.assert_array_equal(packed, alone)


@every_objective
def test_at_the_weights_that_sampled_the_gradient_is_the_weighted_advantage(name):
  """One update a rollout: clipping and level of the ratio play no part, what is left is REINFORCE with a baseline."""
  o = chosen(rl(objective=name, kl_weight=0.0))
  batch, _, reference, places = hand_batch(o)
  _, gradient = loss_and_gradient(o, batch.logp, reference, batch)
  sequence = {'token': 1, 'sequence': np.repeat(LENGTH, np.reshape(LENGTH, -1)), 'sequence_mean': 1}[o.ratio]
  got = np.concatenate([gradient[cells] for cells in places])
  wanted = np.concatenate([-(batch.weight * batch.advantage)[cells] for cells in places]) * sequence
  np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_an_answer_as_one_action_weighs_its_whole_score_once():
  """RLOO at the weights that sampled: the gradient is the mean over answers of advantage x score of the answer."""
  o = OBJECTIVES['rloo']
  batch, _, reference, places = hand_batch(o)
  _, gradient = loss_and_gradient(o, batch.logp, reference, batch)
  for cells, a in zip(places, np.ravel(plain_advantages('leave_one_out')), strict=True):
    np.testing.assert_allclose(gradient[cells], -a / 6, rtol=1e-6)


def test_gspo_with_answers_of_one_token_is_grpo():
  # One token: the geometric mean is the ratio. 144 tokens, each the end of an answer of its own.
  gspo = chosen(rl(objective='gspo', clip_low=0.2, clip_high=0.28))
  grpo_ = chosen(rl(objective='grpo', clip_low=0.2, clip_high=0.28, kl_weight=0.0))
  rng, (batch, *_) = np.random.default_rng(0), hand_batch(gspo)
  logp, advantage = rng.normal(0, 0.3, (6, 24)).astype(np.float32), rng.normal(size=(6, 24)).astype(np.float32)
  batch = batch.replace(segments=np.tile(np.arange(1, 25, dtype=np.int32), (6, 1)), advantage=advantage,
                        logp=np.zeros_like(logp), weight=np.full_like(logp, 1 / 144))
  got, wanted = (loss_and_gradient(o, logp, logp, batch) for o in (gspo, grpo_))
  assert 0 < np.count_nonzero(wanted[1]) < 144  # some are clipped
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), got, wanted)


def test_cispo_never_takes_a_tokens_gradient_away_and_bounds_its_weight():
  advantage, ratios = np.array([1.0, -1.0, 2.0]), np.array([50.0, 1e-3, 1.5])
  got = jax.jit(jax.grad(lambda x: grpo.weight_loss(x, 0.0, advantage, 1.0, 4.0).sum()))(np.log(ratios))
  np.testing.assert_allclose(got, [-5, 1e-3, -3], rtol=1e-5)
  wanted = [True, False, False]
  np.testing.assert_array_equal(grpo.out_of_range(np.log(ratios), 0.0, advantage, 1.0, 4.0), wanted)


@every_objective
def test_an_importance_weight_multiplies_the_policy_and_leaves_the_kl_term(name):
  o = chosen(rl(objective=name, kl_weight=0.5))
  batch, logp, reference, _ = hand_batch(o)
  _, whole = loss_and_gradient(o, logp, reference, batch)
  _, policy = loss_and_gradient(chosen(rl(objective=name, kl_weight=0.0)), logp, reference, batch)
  for factor in (3, 0):
    _, got = loss_and_gradient(o, logp, reference, batch.replace(importance=np.full_like(logp, factor)))
    np.testing.assert_allclose(got, whole + (factor - 1) * policy, rtol=1e-5, atol=1e-7)


# Through the model: accumulation, padding and packing.

# A log-prob of -2.8, ln 16, has a float32 spacing of 2.4e-7, and a ratio is off by what its log-prob is off. Weights
# that leave the logits within a nat keep it to that; one form of the experts serves any number of tokens.
VOCAB = 16
MODEL = tiny_model(vocab_size=VOCAB, layers=1, dense_layers=0, init_std=0.1, expert_path='dense')
SAMPLING = dict(temperature=1.0, top_k=0, top_p=1.0)
B, G, S = 2, 4, 6
LAYOUTS = {'alone, one at a time': (9, 1), 'packed': (20, 8)}  # against alone, all at once


@functools.cache
def rollout() -> Rollout:
  """Random answers of 1 to 6 tokens to prompts of 3 and 4; the old log-probs are 0.3 nats off the model's."""
  rng = np.random.default_rng(3)
  length = np.array([[4, 6, 1, 6], [3, 2, 5, 2]], np.int32)
  response = rng.integers(2, VOCAB, (B, G, S)) * (np.arange(S) < length[..., None])
  logp = np.where(np.arange(S) < length[..., None], rng.normal(-math.log(VOCAB), 0.3, (B, G, S)), 0)
  prompts = rng.integers(2, VOCAB, (B, 4)) * (np.arange(4) < [[3], [4]])
  return Rollout(prompts.astype(np.int32), np.array([3, 4], np.int32), response.astype(np.int32),
                 logp.astype(np.float32), length, length < S, np.arange(B, dtype=np.int32))


@jax.jit
def pull_back(variables, batch, slope):
  """(log-probs, gradient of the weights for a loss with this slope by each log-prob)."""
  net = Transformer(MODEL)
  logp, back = jax.vjp(lambda p: score(net, variables | {'params': p}, batch, SAMPLING)[0], variables['params'])
  return logp, back(slope)[0]


@functools.cache
def gradients(row_tokens: int, microbatch_rows: int) -> dict[str, dict]:
  """Gradient by objective, summed over microbatches as the update does."""
  variables, r, out = tiny_variables(MODEL), rollout(), {}
  reward = np.array([[1, 0, 0.1, 1.1], [0, 0, 1, 0]], np.float32)
  for name in OBJECTIVES:
    o, total = chosen(rl(objective=name, kl_weight=0.1)), None
    weight = grpo.token_weights(r.length_BxG.reshape(-1), o.loss_denominator, S).reshape(B, G)
    batch, used = pack(r, grpo.advantages(o.advantage, reward, r.length_BxG), weight, row_tokens=row_tokens,
                       microbatch_rows=microbatch_rows)
    assert used == (8 if microbatch_rows == 1 else 1)
    for i in range(used):
      part = jax.tree.map(lambda x, i=i: x[i], batch).replace(importance=np.ones_like(batch.logp[i]))
      logp, _ = pull_back(variables, part, jnp.zeros_like(part.logp))
      _, slope = loss_and_gradient(o, logp, part.logp - 0.1, part)  # any reference that goes with the token
      _, gradient = pull_back(variables, part, slope)
      total = gradient if total is None else jax.tree.map(np.add, total, gradient)
    out[name] = total
  return out


def norm(tree) -> float:
  return math.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree)))


@every_objective
@pytest.mark.parametrize('layout', LAYOUTS)
def test_accumulation_padding_and_packing_change_no_gradient(name, layout):
  wanted, got = gradients(9, 8)[name], gradients(*LAYOUTS[layout])[name]
  assert norm(jax.tree.map(np.subtract, got, wanted)) <= 1e-6 * norm(wanted) and norm(wanted) > 0.01
