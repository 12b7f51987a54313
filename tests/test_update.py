"""The packed batch and the GRPO update: every token once, and the gradient of a plain recomputation; the trainer's own
log-probs; and the sampler's expert choices, replayed."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import EOS, assert_trees_close, favouring, tiny_model, tiny_variables

from moe_rl.config import base_config
from moe_rl.models.transformer import Transformer
from moe_rl.rl import grpo
from moe_rl.rl.batch import one_a_group, pack
from moe_rl.rl.sampler import Rollout, make_sampler
from moe_rl.rl.update import make_grpo_update, make_scoring, score
from moe_rl.runtime.keys import key_for
from moe_rl.runtime.mesh import HOST_MEMORY, one_device_mesh
from moe_rl.runtime.state import TrainState

MODEL = tiny_model(layers=2, dense_layers=0)  # the update is what compiles longest: MoE layers only
SAMPLING = dict(temperature=0.8, top_k=0, top_p=1.0)
GROUP, MAX_NEW, LONGEST = 4, 6, 9
OPTIMIZER = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)  # the rate is data: one compilation for all rates


def rl_config(**changes):
  """config.rl of the tiny base with the KL term large enough to be seen beside the policy's."""
  c = base_config('tiny').rl
  c.update({'kl_weight': 0.05, **changes})
  return c


# Packing.


@st.composite
def rollouts(draw):
  """A rollout of random lengths whose ids are all different, so that no token can pass for another."""
  batch, group = draw(st.integers(1, 4)), draw(st.integers(2, 5))
  prompt = np.array(draw(st.lists(st.integers(1, 6), min_size=batch, max_size=batch)), np.int32)
  length = np.array(draw(st.lists(st.integers(1, 8), min_size=batch * group, max_size=batch * group)), np.int32)
  length = length.reshape(batch, group)
  response = np.where(np.arange(8) < length[..., None], 1000 + np.arange(batch * group * 8).reshape(batch, group, 8), 0)
  prompts = np.where(np.arange(6) < prompt[:, None], 1 + np.arange(batch * 6).reshape(batch, 6), 0)
  return Rollout(
    prompt_BxP=prompts.astype(np.int32), prompt_length_B=prompt, response_BxGxS=response.astype(np.int32),
    logp_BxGxS=np.where(response > 0, -response / 128, 0).astype(np.float32), length_BxG=length,
    stopped_BxG=length < 8, problem_B=np.arange(batch, dtype=np.int32))


def test_minibatches_of_samples_have_some_of_every_prompt_whoever_holds_it():
  """Parts of two hosts, who have every other prompt, are together the parts of one."""
  batch, group, parts = 4, 6, 3
  ids = np.arange(batch * group, dtype=np.int32).reshape(batch, group)
  whole = Rollout(prompt_BxP=ids[:, :2], prompt_length_B=ids[:, 0], response_BxGxS=ids[..., None], logp_BxGxS=None,
                  length_BxG=ids, stopped_BxG=ids > 0, problem_B=np.arange(batch, dtype=np.int32))
  one = one_a_group(whole)
  np.testing.assert_array_equal(one.length_BxG // group, one.problem_B[:, None])
  np.testing.assert_array_equal(one.prompt_BxP, whole.prompt_BxP[one.problem_B])
  np.testing.assert_array_equal(one.length_BxG, ids.T.reshape(-1, 1))  # as `learn` turns advantages and weights
  hosts = [one_a_group(jax.tree.map(lambda x, i=i: x[i::2], whole)) for i in range(2)]
  for part, *own in zip(*(np.split(r.length_BxG, parts) for r in (one, *hosts)), strict=True):
    assert (np.bincount(part[:, 0] // group) == group // parts).all()
    for i in range(2):
      np.testing.assert_array_equal(part[i::2], own[i])


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(rollouts(), st.integers(14, 40), st.integers(1, 5))
def test_packing_keeps_every_token_log_prob_advantage_and_weight_exactly_once(rollout, row_tokens, microbatch_rows):
  batch, group = rollout.length_BxG.shape
  advantage = np.arange(batch * group, dtype=np.float32).reshape(batch, group) - 3
  weight = (advantage + 4) / 64
  packed, used = pack(rollout, advantage, weight, row_tokens=row_tokens, microbatch_rows=microbatch_rows)
  # Shapes are those of one sample a row, whatever the lengths.
  assert packed.ids.shape == (-(-batch * group // microbatch_rows), microbatch_rows, row_tokens)

  left, filled = {(b, g) for b in range(batch) for g in range(group)}, []
  rows = {name: getattr(packed, name).reshape(-1, row_tokens)
          for name in ('ids', 'positions', 'segments', 'weight', 'advantage', 'logp')}
  for n in range(len(rows['ids'])):
    row = {name: values[n] for name, values in rows.items()}
    at, seen = 0, set()
    while at < row_tokens and row['segments'][at]:
      segment = row['segments'][at]
      size = (row['segments'] == segment).sum()
      cells = {name: values[at:at + size] for name, values in row.items()}
      assert (cells['segments'] == segment).all() and segment not in seen  # each whole, without gaps
      seen.add(segment)
      b, g = divmod((cells['ids'][-1] - 1000) // 8, group)  # by construction of the ids
      left.remove((b, g))  # KeyError: twice
      p, r = rollout.prompt_length_B[b], rollout.length_BxG[b, g]
      prompt, response = rollout.prompt_BxP[b, :p], rollout.response_BxGxS[b, g, :r]
      np.testing.assert_array_equal(cells['ids'], [*prompt, *response])
      np.testing.assert_array_equal(cells['positions'], np.arange(p + r))
      np.testing.assert_array_equal(cells['weight'], [0] * p + [weight[b, g]] * r)
      np.testing.assert_array_equal(cells['advantage'], [0] * p + [advantage[b, g]] * r)
      np.testing.assert_array_equal(cells['logp'], [*[0] * p, *rollout.logp_BxGxS[b, g, :r]])
      at += size
    assert all((values[at:] == 0).all() for values in row.values())  # padding
    filled.append(at)
  assert not left
  in_use = [f for f in filled if f]
  assert all(a + b > row_tokens for i, a in enumerate(in_use) for b in in_use[:i])  # no two rows could have been one
  assert filled[:len(in_use)] == in_use and used == -(-len(in_use) // microbatch_rows)


def test_a_sample_longer_than_a_row_is_refused_with_the_key_to_raise():
  with pytest.raises(ValueError, match='a sample of 9 tokens does not fit a row of 8: raise rl.row_tokens'):
    packed_batch(rollout(), row_tokens=8, microbatch_rows=2)


def test_a_sample_of_no_weight_takes_no_room_and_the_others_keep_theirs():
  ones = np.ones((2, GROUP), np.float32)
  kept = np.array([[1, 0, 1, 1], [0, 1, 1, 0]], np.float32)  # 5 of 7, 7, 9; 7, 9 tokens
  packed, used = pack(rollout(), ones, kept / 4, row_tokens=9, microbatch_rows=1)
  assert packed.ids.shape == (8, 1, 9) and used == 5  # shapes are those of the whole
  assert (packed.weight > 0).sum() == LENGTH[kept > 0].sum() and set(np.unique(packed.weight)) == {0, 0.25}
  whole = pack(rollout(), ones, ones, row_tokens=9, microbatch_rows=1)[0].ids[:, 0].tolist()
  left = [i for i in packed.ids[:, 0].tolist() if any(i)]
  assert all(row in whole for row in left) and len(left) == 5
  assert pack(rollout(), ones, 0 * ones, row_tokens=9, microbatch_rows=1)[1] == 0  # nothing left: nothing computed


def test_weights_without_the_samples_left_out_are_means_over_the_others():
  kept = np.array([True, False, True])
  for denominator, wanted in (('sequence', [1 / (2 * 2), 0, 1 / (2 * 10)]), ('token', [1 / 12, 0, 1 / 12]),
                              ('constant', [1 / (2 * 20), 0, 1 / (2 * 20)])):
    np.testing.assert_allclose(grpo.token_weights(np.array([2, 4, 10]), denominator, 20, kept), wanted, rtol=1e-6)
  np.testing.assert_array_equal(grpo.token_weights(np.array([2]), 'token', 20, np.array([False])), 0)


# A small rollout, and its update written out plainly.

PROMPT_LENGTH = np.array([3, 5], np.int32)
LENGTH = np.array([[4, 6, 4, 6], [4, 2, 4, 2]], np.int32)  # 7 or 9 tokens with the prompt: two compilations
REWARD = np.array([[1, 0, 0.1, 1.1], [0, 0, 1, 0]], np.float32)


@functools.cache
def variables():
  return tiny_variables(MODEL)


@functools.cache
def reference():
  """Weights a little off, so that the KL estimate is some hundredths of a nat."""
  rng = np.random.default_rng(7)
  return jax.tree.map(lambda x: (x + 0.006 * rng.normal(size=x.shape)).astype(np.float32), variables()['params'])


@functools.cache
def rollout(noise: float = 0.3) -> Rollout:
  """Random tokens; the sampler's log-probs are the model's with `noise` nats on them, as of stale weights."""
  rng = np.random.default_rng(1)
  prompts = rng.integers(2, 64, (2, 5)) * (np.arange(5) < PROMPT_LENGTH[:, None])
  response = rng.integers(2, 64, (2, GROUP, MAX_NEW)) * (np.arange(MAX_NEW) < LENGTH[..., None])
  logp = np.zeros(response.shape, np.float32)
  for b, g in np.ndindex(2, GROUP):
    p, r = PROMPT_LENGTH[b], LENGTH[b, g]
    ids = np.array([*prompts[b, :p], *response[b, g, :r]], np.int32)
    own = log_softmax_of(variables()['params'], ids)[np.arange(p - 1, p + r - 1), ids[p:]]
    logp[b, g, :r] = own + noise * rng.normal(size=r)
  return Rollout(prompts.astype(np.int32), PROMPT_LENGTH, response.astype(np.int32), logp, LENGTH,
                 LENGTH < MAX_NEW, np.arange(2, dtype=np.int32))


def packed_batch(rollout, *, denominator='token', reward=REWARD, row_tokens=LONGEST, microbatch_rows=8):
  shape = rollout.length_BxG.shape
  weight = grpo.token_weights(rollout.length_BxG.reshape(-1), denominator, MAX_NEW).reshape(shape)
  packed, used = pack(
    rollout, grpo.group_advantage(reward), weight, row_tokens=row_tokens, microbatch_rows=microbatch_rows)
  return packed, np.int32(used)


def plain_logits(params, ids_T):
  """float32 [T, V] of one sequence alone, nothing padded or packed."""
  net, everything = Transformer(MODEL), {'params': params, 'router': variables()['router']}
  positions = jnp.arange(ids_T.size)[None]
  hidden = net.apply(everything, ids_T[None], positions, jnp.ones_like(positions)).hidden_NxTxD
  return net.apply(everything, hidden, method=net.logits)[0]


logits_of = jax.jit(plain_logits)
pull_back = jax.jit(lambda params, ids, cotangent: jax.vjp(lambda p: plain_logits(p, ids), params)[1](cotangent)[0])


def log_softmax_of(params, ids) -> np.ndarray:
  logits = np.asarray(logits_of(params, ids), np.float64) / SAMPLING['temperature']
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@functools.cache
def plain_update(denominator: str):
  """(gradient, metrics) by loops over samples and tokens in float64, the loss differentiated by hand.

  Per token, with r = pi / old: loss = -min(r A, clip(r) A) + 0.05 k3, k3 = ref / pi - log(ref / pi) - 1;
  d loss / d log pi = -r A where not clipped, + 0.05 (1 - ref / pi); d log pi / d logits = (one-hot - p) / temperature.
  """
  r, gradient, loss, tokens = rollout(), None, 0.0, []
  for b, g in np.ndindex(2, GROUP):
    p, n = PROMPT_LENGTH[b], LENGTH[b, g]
    ids = np.array([*r.prompt_BxP[b, :p], *r.response_BxGxS[b, g, :n]], np.int32)
    logps, references = log_softmax_of(variables()['params'], ids), log_softmax_of(reference(), ids)
    advantage = (REWARD[b, g] - REWARD[b].mean()) / (REWARD[b].std() + 1e-6)
    weight = {'sequence': 1 / 8 / n, 'token': 1 / 32, 'constant': 1 / 8 / 6}[denominator]  # 32 tokens in 8 samples
    cotangent = np.zeros_like(logps)
    for t in range(n):
      before, token = p + t - 1, ids[p + t]
      logp, old = logps[before, token], r.logp_BxGxS[b, g, t]
      ratio, towards = np.exp(logp - old), np.exp(references[before, token] - logp)
      held = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
      k3 = towards - np.log(towards) - 1
      loss += weight * (-np.clip(ratio, 0.8, 1.28) * advantage if held else -ratio * advantage) + weight * 0.05 * k3
      slope = weight * ((0 if held else -ratio * advantage) + 0.05 * (1 - towards))
      cotangent[before] = slope * (np.eye(64)[token] - np.exp(logps[before])) / SAMPLING['temperature']
      tokens.append([k3, -(np.exp(logps[before]) * logps[before]).sum(), held, ratio, abs(logp - old)])
    part = pull_back(variables()['params'], ids, cotangent.astype(np.float32))
    gradient = part if gradient is None else jax.tree.map(np.add, gradient, part)
  kl, entropy, clipped, ratio, gap = np.mean(tokens, axis=0)
  norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(gradient)))
  return gradient, dict(loss=loss, kl=kl, entropy=entropy, clipped=clipped, ratio=ratio, sampler_gap_mean=gap,
                        sampler_gap=np.max(tokens, axis=0)[4], grad_norm=norm)


# The update itself.

RATE = 1024.0  # a power of two, so that dividing it out is exact; and the change is not lost beside the weights


@functools.cache
def update(**changes):
  return jax.jit(make_grpo_update(Transformer(MODEL), OPTIMIZER, rl_config(**changes), SAMPLING), donate_argnums=0)


def fresh(rate=RATE, params=None, reference_params=None) -> TrainState:
  params = jax.tree.map(jnp.array, variables()['params'] if params is None else params)  # copies: they are donated
  opt_state = OPTIMIZER.init(params)
  opt_state.hyperparams['learning_rate'] = jnp.float32(rate)
  return TrainState(jnp.int32(0), params, jax.tree.map(jnp.array, variables()['router']), opt_state,
                    jax.tree.map(jnp.array, reference() if reference_params is None else reference_params))


@functools.cache
def updated(denominator='token', row_tokens=LONGEST, microbatch_rows=8):
  """(gradient, metrics, microbatches in use): the parameters' change under SGD is the gradient."""
  batch, used = packed_batch(rollout(), denominator=denominator, row_tokens=row_tokens, microbatch_rows=microbatch_rows)
  state, metrics = update()(fresh(), batch, used)
  gradient = jax.tree.map(lambda old, new: (old - new) / RATE, variables()['params'], state.params)
  return gradient, jax.device_get(metrics), used


def assert_metrics_close(got, wanted):
  for name, value in wanted.items():
    # Means over 32 tokens of float32 log-probs of about 5 nats, each good to 2e-6.
    assert got[name] == pytest.approx(float(value), rel=2e-5, abs=5e-6), name


@pytest.mark.parametrize('denominator', ['sequence', 'token', 'constant'])
def test_loss_gradient_and_metrics_are_those_of_a_plain_recomputation(denominator):
  gradient, metrics, _ = updated(denominator)
  wanted, numbers = plain_update(denominator)
  assert 0.1 < numbers['clipped'] < 0.5 and numbers['kl'] > 0.01  # all branches of the loss are at work
  # float32 through three layers: sums of 32 tokens and 64 logits in another order, 1e-6 of the largest entry each.
  assert_trees_close(gradient, wanted, rtol=1e-5)
  assert_metrics_close(metrics, numbers)


@pytest.mark.parametrize('row_tokens, microbatch_rows, microbatches', [
  (LONGEST, 1, 8), (LONGEST, 2, 4), (16, 3, 2)])  # alone in their rows, then packed in pairs, two rows left empty
def test_accumulation_and_packing_change_no_gradient_and_no_metric(row_tokens, microbatch_rows, microbatches):
  gradient, metrics, used = updated('sequence', row_tokens, microbatch_rows)
  assert used == microbatches
  whole, numbers, _ = updated('sequence')  # eight rows in one microbatch
  # The same float32 terms in another order, through other forms of the expert layer (few tokens take the dense one).
  assert_trees_close(gradient, whole, rtol=1e-5)
  assert_metrics_close(metrics, numbers)


def test_a_reference_in_host_memory_changes_no_bit_and_stays_there():
  placed = jax.tree.map(lambda x: x.sharding, fresh().params)
  far = jax.tree.map(lambda s: NamedSharding(one_device_mesh(), PartitionSpec(), memory_kind=HOST_MEMORY), placed)
  near = jax.tree.map(lambda s: s.with_memory_kind('device'), far)
  state, other = fresh(), fresh()
  other = jax.device_put(other, NamedSharding(one_device_mesh(), PartitionSpec()))
  other = other.replace(reference=jax.device_put(other.reference, far))
  host = make_grpo_update(Transformer(MODEL), OPTIMIZER, rl_config(reference_memory='host'), SAMPLING, near)
  batch, used = packed_batch(rollout())
  (wanted, numbers), (got, metrics) = (
    update()(state, batch, used), jax.jit(host, donate_argnums=0)(other, batch, used))
  jax.tree.map(np.testing.assert_array_equal, got, wanted)
  assert jax.device_get(metrics) == jax.device_get(numbers)
  assert {x.sharding.memory_kind for x in jax.tree.leaves(got.reference)} == {HOST_MEMORY}


def test_all_metrics_are_there_and_finite():
  _, metrics, _ = updated()
  wanted = 'loss kl entropy clipped ratio grad_norm sampler_gap sampler_gap_mean load_max load_min bias_max'.split()
  assert sorted(metrics) == sorted(wanted)
  assert all(np.isfinite(v) for v in metrics.values())
  assert metrics['load_min'] <= 1 <= metrics['load_max'] and metrics['bias_max'] == 0
  assert 0 < metrics['entropy'] < np.log(64)


def test_a_batch_of_tied_groups_changes_no_weight_and_only_the_balance_moves_the_router():
  state = fresh(reference_params={})
  batch, used = packed_batch(rollout(), reward=np.full((2, GROUP), 0.7, np.float32))
  new, metrics = update(kl_weight=0.0, bias_rate=1e-3)(state, batch, used)
  jax.tree.map(np.testing.assert_array_equal, new.params, variables()['params'])
  assert metrics['loss'] == 0 and metrics['grad_norm'] == 0 and 'kl' not in metrics

  # Up for experts with less than the mean load, down for those with more, by the rate; padding counts for none.
  first = jax.tree.map(lambda x: x[0], batch)
  load = np.asarray(jax.jit(functools.partial(score, Transformer(MODEL), sampling=SAMPLING))(variables(), first)[2])
  np.testing.assert_array_equal(load.sum(1), 64 * 2)  # 64 tokens pick 2 experts in each of the 2 layers
  assert len(np.unique(load)) > 1
  bias = new.router['moe']['ff']['bias']
  np.testing.assert_array_equal(bias, np.float32(1e-3) * np.sign(32 - load))
  assert metrics['bias_max'] == np.float32(1e-3)
  assert metrics['load_max'] == load.max() / 32 and metrics['load_min'] == load.min() / 32


def test_the_router_bias_is_frozen_at_rate_zero():
  batch, used = packed_batch(rollout())
  state, _ = update()(fresh(), batch, used)
  np.testing.assert_array_equal(state.router['moe']['ff']['bias'], 0)


def test_the_state_is_donated_and_its_step_advances():
  state, (batch, used) = fresh(), packed_batch(rollout())
  given = jax.tree.leaves(state.params)
  for step in (1, 2):
    state, _ = update()(state, batch, used)
    assert state.step == step
  assert all(leaf.is_deleted() for leaf in given)
  jax.tree.map(np.testing.assert_array_equal, state.reference, reference())  # the update moves no reference


def test_the_kl_term_pulls_toward_the_reference():
  batch, used = packed_batch(rollout(), reward=np.zeros((2, GROUP), np.float32))  # nothing but the KL term
  before = jax.device_get(update()(fresh(rate=0.0), batch, used)[1])
  assert before['kl'] > 0.01 and before['loss'] == pytest.approx(0.05 * before['kl'], rel=1e-5)
  rate = 0.01 * before['loss'] / before['grad_norm']**2  # to first order, a step that takes off a hundredth
  state, _ = update()(fresh(rate), batch, used)
  _, after = update()(state, batch, used)
  assert after['kl'] / before['kl'] == pytest.approx(0.99, abs=0.002)


def test_at_the_reference_the_kl_term_moves_nothing():
  batch, used = packed_batch(rollout(), reward=np.zeros((2, GROUP), np.float32))
  state, metrics = update()(fresh(reference_params=variables()['params']), batch, used)
  assert metrics['kl'] == 0
  jax.tree.map(np.testing.assert_array_equal, state.params, variables()['params'])


def test_the_ratio_is_one_in_the_first_minibatch_of_a_rollout_and_leaves_one_in_the_second():
  state, metrics = fresh(rate=0.1), []
  for b in range(2):  # two minibatches of one prompt each, sampled by the weights before the first
    half = jax.tree.map(lambda x, b=b: x[b:b + 1], rollout(noise=0.0))
    batch, used = packed_batch(half, reward=REWARD[b:b + 1])
    state, m = update()(state, batch, used)
    metrics.append(m)
  # Equal weights: rounding of log-probs alone, where an ulp is up to 5e-7; jax 0.12 gives 1.1e-5.
  assert metrics[0]['ratio'] == pytest.approx(1, abs=1e-5) and metrics[0]['sampler_gap'] < 2e-5
  assert metrics[0]['clipped'] == 0
  assert abs(metrics[1]['ratio'] - 1) > 1e-3 and metrics[1]['sampler_gap'] > 1e-2


# The trainer's own log-probs, before the first update.


@functools.cache
def scored(noise: float = 0.3, **changes):
  """(batch, metrics, microbatches in use) with the trainer's log-probs in place of the sampler's."""
  batch, used = packed_batch(rollout(noise), denominator='sequence', microbatch_rows=4)
  given = rl_config(old_logp='trainer', **changes)
  scoring = jax.jit(make_scoring(Transformer(MODEL), given, SAMPLING))
  return *jax.device_get(scoring(variables(), batch, used)), batch, used


def test_scoring_gives_the_models_own_log_probs_and_the_gap_to_the_samplers():
  batch, metrics, sampled, used = scored()
  exact, _ = packed_batch(rollout(noise=0.0), denominator='sequence', microbatch_rows=4)  # the model's, one by one
  assert used == 2
  np.testing.assert_allclose(batch.logp, exact.logp, atol=1e-5)  # rounding of log-probs of about 5 nats
  gap = np.abs(exact.logp - sampled.logp)[sampled.weight > 0]
  assert metrics['sampler_gap'] == pytest.approx(gap.max(), abs=1e-5) and gap.max() > 0.5
  assert metrics['sampler_gap_mean'] == pytest.approx(gap.mean(), abs=1e-5)
  assert batch.importance is None and sorted(metrics) == ['sampler_gap', 'sampler_gap_mean']
  for name in ('ids', 'positions', 'segments', 'weight', 'advantage'):
    np.testing.assert_array_equal(getattr(batch, name), getattr(sampled, name))


def test_importance_weights_go_with_the_batch_and_what_they_cut_is_counted():
  batch, metrics, sampled, _ = scored(importance='truncate', importance_range=(0.5, 1.25))
  answer = sampled.weight > 0
  w = np.exp((batch.logp - sampled.logp).astype(np.float64))[answer]
  assert 0.1 < (w > 1.25).mean() < 0.5
  np.testing.assert_allclose(batch.importance[answer], np.minimum(w, 1.25), rtol=1e-5)
  assert metrics['importance_cut'] == pytest.approx((w > 1.25).mean(), abs=1e-6)
  assert metrics['importance'] == pytest.approx(np.minimum(w, 1.25).mean(), rel=1e-5)


def test_with_the_trainers_old_log_probs_the_first_ratio_is_one_whatever_the_sampler_said():
  batch, _, _, _ = scored()
  _, metrics = update()(fresh(rate=0.0), jax.tree.map(lambda x: x.reshape(1, 8, LONGEST), batch), np.int32(1))
  assert metrics['ratio'] == pytest.approx(1, abs=1e-5) and metrics['clipped'] == 0


# Routing replay. All experts of a layer have nearly the same router column, so rounding decides who is picked, and
# nothing alike in their own weights, so another pick is another answer.

NEAR_TIES = tiny_model(layers=2, dense_layers=0, init_std=0.2)
PROMPTS = np.random.default_rng(5).integers(2, 64, (5, 6)).astype(np.int32)


@functools.cache
def tied_variables():
  variables = favouring(tiny_variables(NEAR_TIES), EOS, 1.0)
  router = variables['params']['moe']['ff']['router']  # [layers, width, experts]
  router[..., 1:] = router[..., :1] + 1e-7 * np.random.default_rng(0).normal(size=router[..., 1:].shape)
  return variables


@functools.cache
def replayed():
  """(rollout with its picks, its packed batch)."""
  net = Transformer(NEAR_TIES)
  sample = jax.jit(make_sampler(net, group=8, max_new=10, eos_id=EOS, record_picks=True, **SAMPLING))
  lengths = np.array([3, 6, 1, 5, 6], np.int32)
  prompts = PROMPTS * (np.arange(6) < lengths[:, None])
  r = jax.device_get(sample(tied_variables(), prompts, lengths, np.arange(5, dtype=np.int32), key_for(0, 'rollout', 0)))
  ones = np.ones((5, 8), np.float32)
  return r, pack(r, ones, ones, row_tokens=40, microbatch_rows=20)[0]


@jax.jit
def value_and_router_gradient(params, router, batch):
  def total(params):
    logp, _, load = score(Transformer(NEAR_TIES), {'params': params, 'router': router}, batch, SAMPLING)
    return (logp * (batch.weight > 0)).sum(), (logp, load)
  gradient, aux = jax.grad(total, has_aux=True)(params)
  return *aux, gradient['moe']['ff']['router']


def scores(batch, router=None):
  """(log-probs, expert loads, gradient of the log-probs' sum by the router's weights), under the near ties."""
  variables = tied_variables()
  return jax.device_get(value_and_router_gradient(variables['params'], router or variables['router'], batch))


def test_recorded_picks_are_experts_for_every_token_that_was_read_and_minus_one_elsewhere():
  r, batch = replayed()
  layers, top_k = NEAR_TIES.moe_layers, NEAR_TIES.top_k
  assert r.prompt_picks_BxPxLxK.shape == (5, 6, layers, top_k) and r.prompt_picks_BxPxLxK.dtype == np.int16
  assert r.picks_BxGxSxLxK.shape == (5, 8, 10, layers, top_k)
  assert 0 < r.stopped_BxG.sum() < 40
  read = np.arange(10) < r.length_BxG[..., None] - 1  # nothing follows the last token
  for picks, where in ((r.picks_BxGxSxLxK, read), (r.prompt_picks_BxPxLxK, np.arange(6) < r.prompt_length_B[:, None])):
    assert ((picks >= 0) & (picks < 4)).all((-1, -2))[where].all() and (picks[~where] == -1).all()
    assert (picks[where][..., 0] != picks[where][..., 1]).all()
  assert (batch.picks >= 0).all((-1, -2)).sum() == (r.prompt_length_B[:, None] + r.length_BxG - 1).sum()


def test_with_replay_the_trainers_log_probs_are_the_samplers_where_without_it_near_ties_go_another_way():
  _, batch = replayed()
  first = jax.tree.map(lambda x: x[0], batch)
  answer = first.weight > 0
  (logp, load, _), (free, free_load, _) = (scores(b) for b in (first, first.replace(picks=None)))
  gap, free_gap = np.abs(logp - first.logp)[answer], np.abs(free - first.logp)[answer]
  assert gap.max() <= 1e-5 and gap.size > 100  # float32 log-probs of about 4 nats in two orders of summing
  assert (free_gap > 0.01).mean() > 0.05  # the near ties are real
  np.testing.assert_array_equal(load.sum(1), free_load.sum(1))
  assert (load != free_load).any()


def test_replayed_tokens_load_the_experts_that_the_sampler_picked():
  _, batch = replayed()
  first = jax.tree.map(lambda x: x[0], batch)
  _, load, _ = scores(first)
  recorded = np.stack([np.bincount(first.picks[:, :, layer][first.picks[:, :, layer] >= 0], minlength=4)
                       for layer in range(2)])
  samples = len({(row, s) for row, s in zip(*np.nonzero(first.segments), strict=True)
                 if first.segments[row, s] != (first.segments[row, s + 1] if s + 1 < 40 else 0)})
  assert (load >= recorded).all()
  np.testing.assert_array_equal((load - recorded).sum(1), samples * 2)  # each sample's last token chooses for itself


def test_gates_are_computed_anew_so_the_router_has_a_gradient():
  _, batch = replayed()
  _, _, gradient = scores(jax.tree.map(lambda x: x[0], batch))
  assert np.isfinite(gradient).all() and (np.abs(gradient).max((0, 1)) > 1e-3).all()  # of every expert


def test_the_selection_bias_is_idle_for_replayed_tokens():
  _, batch = replayed()
  first = jax.tree.map(lambda x: x[0], batch)
  bias = np.tile(np.float32([5, -5, 5, -5]), (2, 1))  # decides every free choice
  router = {'moe': {'ff': {'bias': bias}}}
  (logp, load, _), (_, free, _) = scores(first, router), scores(first.replace(picks=None), router)
  np.testing.assert_allclose(logp[first.weight > 0], scores(first)[0][first.weight > 0], atol=1e-5)
  assert (free[:, [1, 3]] == 0).all() and (load[:, [1, 3]] > 0).all()
