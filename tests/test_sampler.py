"""Law 1, the sampler and the trainer agree on every log-prob; law 2, noise is addressed; and how sampling ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AbstractMesh
from tiny import EOS, favouring, run_jit, tiny_model, tiny_variables

from moe_rl.models.config import Yarn
from moe_rl.models.heads import distribution
from moe_rl.models.transformer import Transformer
from moe_rl.rl.batch import pack
from moe_rl.rl.sampler import draw, few_of, make_sampler, noise, row_keys
from moe_rl.rl.update import score
from moe_rl.runtime.keys import key_for
from moe_rl.runtime.mesh import AXES, Layout
from moe_rl.runtime.run import CompileCounter

MODEL = tiny_model()
V3_LIKE = tiny_model(q_lora=12, groups=2, kept_groups=1, route_scale=2.5, yarn=Yarn(factor=4.0, original_length=16))
GROUP, MAX_NEW, WIDTH = 4, 12, 8
LENGTHS = np.array([3, 8, 1, 5, 8], np.int32)
PROBLEMS = np.array([7, 3, 1_000_003, 0, 42], np.int32)
PROMPTS = np.random.default_rng(0).integers(2, 64, (5, WIDTH)).astype(np.int32) * (np.arange(WIDTH) < LENGTHS[:, None])
SETTINGS = {
  'T=1': (MODEL, dict(temperature=1.0, top_k=0, top_p=1.0)),
  'T=0.7': (MODEL, dict(temperature=0.7, top_k=0, top_p=1.0)),
  'top-k': (MODEL, dict(temperature=1.0, top_k=5, top_p=1.0)),
  'top-p': (MODEL, dict(temperature=1.0, top_k=0, top_p=0.8)),
  'V3-like, all at once': (V3_LIKE, dict(temperature=1.3, top_k=20, top_p=0.9)),
}
STEP_0, STEP_1 = key_for(0, 'rollout', 0), key_for(0, 'rollout', 1)
every_setting = pytest.mark.parametrize('setting', SETTINGS)


@functools.cache
def weights(model):
  """End of text has about one chance in ten at each place, so that some answers end and some are cut."""
  return favouring(tiny_variables(model), EOS, 5.0)


def jit_for(setting):
  """The main setting is compiled as in a run."""
  return run_jit if setting == 'T=1' else jax.jit


@functools.cache
def sampler(setting):
  model, sampling = SETTINGS[setting]
  return jit_for(setting)(make_sampler(Transformer(model), group=GROUP, max_new=MAX_NEW, eos_id=EOS, **sampling))


@functools.cache
def sampled(setting):
  return jax.device_get(sampler(setting)(weights(SETTINGS[setting][0]), PROMPTS, LENGTHS, PROBLEMS, STEP_0))


def one_a_row(rollout):
  """(ids [N, T], lengths of prompts [N], of responses [N]): every sample on a row of its own, unpacked."""
  prompts, responses = np.repeat(rollout.prompt_length_B, GROUP), rollout.length_BxG.reshape(-1)
  ids = np.zeros((prompts.size, WIDTH + MAX_NEW), np.int32)
  for n, (p, r) in enumerate(zip(prompts, responses, strict=True)):
    b, g = divmod(n, GROUP)
    ids[n, :p + r] = [*rollout.prompt_BxP[b, :p], *rollout.response_BxGxS[b, g, :r]]
  return ids, prompts, responses


@functools.cache
def forward(model):
  def logits(variables, ids, lengths):
    net, positions = Transformer(model), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = net.apply(variables, ids, positions, (positions < lengths[:, None]).astype(jnp.int32)).hidden_NxTxD
    return net.apply(variables, hidden, method=net.logits)
  return jax.jit(logits)


def next_logits(setting: str, rollout):
  """(rows of (logits before a response token, the token, its log-prob by the sampler)), from the training forward."""
  ids, prompts, responses = one_a_row(rollout)
  model = SETTINGS[setting][0]
  logits = np.asarray(forward(model)(weights(model), ids, prompts + responses), np.float64)
  for n, (p, r) in enumerate(zip(prompts, responses, strict=True)):
    b, g = divmod(n, GROUP)
    for t in range(r):
      yield logits[n, p + t - 1], ids[n, p + t], rollout.logp_BxGxS[b, g, t]


# Law 1.


@every_setting
def test_the_samplers_log_probs_equal_the_trainers_on_packed_rows(setting):
  rollout, (model, sampling) = sampled(setting), SETTINGS[setting]
  ones = np.ones((5, GROUP), np.float32)
  packed, used = pack(rollout, ones, ones, row_tokens=40, microbatch_rows=6)
  assert packed.segments.max() >= 3  # several samples share a row
  trainer = jit_for(setting)(functools.partial(score, Transformer(model), sampling=sampling))
  gaps = []
  for i in range(used):
    batch = jax.tree.map(lambda x, i=i: x[i], packed)
    logp, entropy, _ = trainer(weights(model), batch)
    gaps.append(np.abs(logp - batch.logp)[batch.weight > 0])
    assert (entropy[batch.weight > 0] > 0).all()
  gaps = np.concatenate(gaps)
  assert gaps.size == rollout.length_BxG.sum()
  # float32 logits of a few nats carry 1e-6 of rounding, and the two forms of attention order their sums differently:
  # 1.1e-5 was the largest gap in 37,000 tokens of these settings. A token at the very edge of top-k or top-p, or of the
  # router's top-k, could jump further: none did.
  assert gaps.max() <= 1e-4
  assert np.quantile(gaps, 0.9) <= 1e-5


@every_setting
def test_a_log_prob_is_that_of_the_tempered_truncated_renormalised_distribution(setting):
  # Written out again in float64, token by token, from the logits of the training forward, one sample a row.
  sampling = SETTINGS[setting][1]
  for logits, token, logp in next_logits(setting, sampled(setting)):
    scaled = logits / sampling['temperature']
    ranked = np.argsort(-scaled)[:sampling['top_k'] or None]
    p = np.exp(scaled[ranked] - scaled.max())
    p /= p.sum()
    support = ranked[:np.searchsorted(np.cumsum(p), sampling['top_p']) + 1]
    assert token in support
    mass = np.exp(scaled[support] - scaled.max()).sum()
    assert logp == pytest.approx(scaled[token] - scaled.max() - np.log(mass), abs=1e-4)  # law 1's own bound


# Law 2.


def test_the_same_key_gives_the_same_samples_bit_for_bit():
  again = jax.device_get(sampler('T=1')(weights(MODEL), PROMPTS, LENGTHS, PROBLEMS, STEP_0))
  jax.tree.map(np.testing.assert_array_equal, again, sampled('T=1'))


def test_the_order_of_the_prompts_changes_no_token():
  order = np.array([4, 2, 0, 3, 1])
  got = jax.device_get(sampler('T=1')(weights(MODEL), PROMPTS[order], LENGTHS[order], PROBLEMS[order], STEP_0))
  np.testing.assert_array_equal(got.response_BxGxS, sampled('T=1').response_BxGxS[order])
  # Rows of a matrix product may be summed in another order at another place.
  np.testing.assert_allclose(got.logp_BxGxS, sampled('T=1').logp_BxGxS[order], atol=1e-5)


def test_a_prompt_alone_and_unpadded_with_fewer_completions_gets_the_same_tokens_as_among_others():
  alone = jax.jit(make_sampler(Transformer(MODEL), group=2, max_new=MAX_NEW, eos_id=EOS))
  for b in (0, 3):  # both padded to width 5, for one compilation
    got = alone(weights(MODEL), PROMPTS[b:b + 1, :5], LENGTHS[b:b + 1], PROBLEMS[b:b + 1], STEP_0)
    np.testing.assert_array_equal(got.response_BxGxS[0], sampled('T=1').response_BxGxS[b, :2])
    np.testing.assert_allclose(got.logp_BxGxS[0], sampled('T=1').logp_BxGxS[b, :2], atol=1e-5)  # rounding, as above


def test_every_token_can_be_replayed_from_its_address():
  # Inverse CDF in float64 of the uniform number at (step's key, problem, sample, position), nothing else.
  @jax.jit
  def uniform(problem, sample, position):
    key = jax.random.fold_in(jax.random.fold_in(STEP_0, problem), sample)
    return jax.random.uniform(jax.random.fold_in(key, position))
  rollout, replay = sampled('T=1'), next_logits('T=1', sampled('T=1'))
  for b, g in np.ndindex(5, GROUP):
    for t in range(rollout.length_BxG[b, g]):
      logits, token, _ = next(replay)
      cdf = np.cumsum(np.exp(logits - logits.max()))
      assert np.searchsorted(cdf, float(uniform(PROBLEMS[b], g, t)) * cdf[-1], side='right') == token


def test_one_prompt_under_two_problem_ids_and_one_under_two_steps_get_other_samples():
  same = np.repeat(PROMPTS[1:2], 5, axis=0), np.repeat(LENGTHS[1:2], 5)
  answers = [sampler('T=1')(weights(MODEL), *same, PROBLEMS, key).response_BxGxS for key in (STEP_0, STEP_1)]
  answers = np.concatenate(answers).reshape(-1, MAX_NEW)
  long = answers[answers[:, 3] > 0]  # four tokens or more: over ten bits of choice
  assert len(long) > 15 and len(np.unique(long, axis=0)) == len(long)


def test_every_run_purpose_step_problem_and_sample_has_its_own_key():
  data = jax.jit(lambda key: jax.random.key_data(row_keys(key, jnp.arange(6), 5)))
  keys = [data(key_for(seed, purpose, step)) for seed in (0, 1) for purpose in ('rollout', 'eval') for step in range(4)]
  assert len(np.unique(np.reshape(keys, (-1, 2)), axis=0)) == 2 * 2 * 4 * 6 * 5


def test_noise_differs_from_position_to_position():
  flat = np.full((2, 2, 4096), -np.log(4096), np.float32)
  uniform = noise(row_keys(STEP_0, jnp.arange(2), 2), 8)
  tokens = np.stack([draw(uniform[..., t], flat)[0] for t in range(8)])
  assert len(np.unique(tokens)) >= 30  # 32 draws of one of 4096: a coincidence has one chance in eight


@pytest.mark.parametrize('vocabulary', [3, 64, 385, 5000])
def test_a_draw_is_the_inverse_of_the_summed_probabilities_and_never_a_token_without_any(vocabulary):
  """The summed float64 probabilities up to the token enclose the number; float32 sums of such sizes are within 1e-6."""
  rng = np.random.default_rng(vocabulary)
  logp = rng.normal(size=(40, 50, vocabulary)) * 3
  logp[rng.random(logp.shape) < 0.5] = -np.inf
  logp[..., 1] = 0.0
  logp = (logp - np.log(np.exp(logp).sum(-1, keepdims=True))).astype(np.float32)
  uniform = rng.integers(0, 2**23, (40, 50)).astype(np.float32) / 2**23  # what jax.random.uniform gives
  uniform[:, 0], uniform[:, 1] = 0, 1 - 2**-23
  token, of_token = jax.jit(draw)(uniform, logp)
  np.testing.assert_array_equal(of_token, np.take_along_axis(logp, np.asarray(token)[..., None], -1)[..., 0])
  assert np.isfinite(of_token).all()
  p = np.exp(logp.astype(np.float64))
  cdf = p.cumsum(-1) / p.sum(-1, keepdims=True)
  end = np.take_along_axis(cdf, np.asarray(token)[..., None], -1)[..., 0]
  assert (uniform <= end + 1e-6).all() and (uniform >= end - np.exp(of_token) - 1e-6).all()


# How answers end.


def test_end_of_text_is_part_of_the_response_and_nothing_follows_it():
  r = sampled('T=1')
  at = np.arange(MAX_NEW) < r.length_BxG[..., None]
  assert (r.response_BxGxS[~at] == 0).all() and (r.logp_BxGxS[~at] == 0).all()
  assert (r.logp_BxGxS[at] < 0).all() and np.isfinite(r.logp_BxGxS).all()
  last = np.take_along_axis(r.response_BxGxS, r.length_BxG[..., None] - 1, axis=-1)[..., 0]
  np.testing.assert_array_equal(last == EOS, r.stopped_BxG)
  assert ((r.response_BxGxS == EOS).sum(-1) == r.stopped_BxG).all()


def test_an_answer_cut_at_the_limit_has_not_stopped():
  r = sampled('T=1')
  cut = ~r.stopped_BxG
  assert cut.any() and r.stopped_BxG.any()  # both happen in these 20
  assert (r.length_BxG[cut] == MAX_NEW).all()


def test_the_rollout_returns_its_prompts_and_addresses():
  r = sampled('T=1')
  for got, given in ((r.prompt_BxP, PROMPTS), (r.prompt_length_B, LENGTHS), (r.problem_B, PROBLEMS)):
    np.testing.assert_array_equal(got, given)


def test_decoding_stops_when_the_last_answer_is_done(monkeypatch):
  decoded, original = [], Transformer.decode

  def counting(self, ids, cache, live):
    jax.debug.callback(decoded.append, cache.own_length)
    return original(self, ids, cache, live)
  monkeypatch.setattr(Transformer, 'decode', counting)
  sample = jax.jit(make_sampler(Transformer(MODEL), group=GROUP, max_new=MAX_NEW, eos_id=EOS))

  def run(gain):
    decoded.clear()
    rollout = jax.device_get(sample(favouring(tiny_variables(MODEL), EOS, gain), PROMPTS, LENGTHS, PROBLEMS, STEP_0))
    jax.effects_barrier()
    return rollout, len(decoded)

  rollout, count = run(1e3)  # end of text and nothing else
  assert count == 0 and (rollout.length_BxG == 1).all() and rollout.stopped_BxG.all()
  assert (rollout.response_BxGxS[..., 0] == EOS).all() and (rollout.response_BxGxS[..., 1:] == 0).all()
  np.testing.assert_allclose(rollout.logp_BxGxS, 0, atol=1e-6)

  rollout, count = run(8.0)  # the first token comes from the prefill
  assert rollout.stopped_BxG.all() and 1 < rollout.length_BxG.max() < MAX_NEW
  assert count == rollout.length_BxG.max() - 1

  rollout, count = run(-1e3)  # never
  assert count == MAX_NEW - 1 and (rollout.length_BxG == MAX_NEW).all() and not rollout.stopped_BxG.any()


# What is drawn.


def test_first_tokens_are_distributed_as_the_softmax():
  # 4096 samples of one prompt: 64 problem ids x 64 completions, so that the noise of both addresses is tested.
  prompts, lengths = np.repeat(PROMPTS[3:4], 64, axis=0), np.repeat(LENGTHS[3:4], 64)
  sample = jax.jit(make_sampler(Transformer(MODEL), group=64, max_new=1, eos_id=EOS))
  tokens = np.asarray(sample(weights(MODEL), prompts, lengths, np.arange(64, dtype=np.int32), STEP_0).response_BxGxS)
  logits, _, _ = list(next_logits('T=1', sampled('T=1')))[sampled('T=1').length_BxG[:3].sum()]  # after the same prompt
  p = np.exp(logits) / np.exp(logits).sum()
  rare = p * tokens.size < 5  # these share a bin, as the test asks for 5 expected in each
  expected, observed = (np.append(x[~rare], x[rare].sum())
                        for x in (p * tokens.size, np.bincount(tokens.reshape(-1), minlength=64)))
  assert expected.size > 20 and expected.min() >= 5
  statistic = ((observed - expected)**2 / expected).sum()
  assert statistic < scipy.stats.chi2.ppf(0.999, expected.size - 1)  # one right sampler of a thousand would fail


def test_draw_never_gives_a_token_of_probability_zero():
  # A cumulative sum taken in parallel steps up by rounding at tokens of probability 0, by 3e-5 in all at this width.
  # Among 131,072 keys are a few whose uniform number falls on such a step: those, and some more, are drawn with.
  size = 65_536
  logits = np.random.default_rng(0).normal(0, 2, size).astype(np.float32)
  logp = np.asarray(jax.jit(lambda x: distribution(x, 1.0, 0, 0.9))(logits))
  impossible, cdf = logp == -np.inf, np.asarray(jax.jit(lambda x: jnp.cumsum(jnp.exp(x)))(logp))
  keys = jax.random.split(jax.random.key(1), 2**17)
  uniform = np.asarray(jax.jit(jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 0))))(keys))
  below, above = np.append(0, cdf[:-1])[impossible], cdf[impossible]
  order = np.argsort(below[above > below])
  below, above = below[above > below][order], above[above > below][order]
  step = np.searchsorted(below, uniform * cdf[-1], side='right') - 1
  on_a_step = np.flatnonzero((step >= 0) & (uniform * cdf[-1] < above[step])) if below.size else []
  chosen = keys[np.unique([*on_a_step, *range(32)]).astype(int)[:64]]
  token, own = jax.jit(draw)(noise(chosen[:, None], 1)[..., 0], np.broadcast_to(logp, (chosen.size, 1, size)))
  assert not impossible[np.asarray(token)].any() and np.isfinite(own).all()


def test_equal_shapes_compile_nothing_anew():
  counter = CompileCounter()
  jax.jit(lambda x: x * 3 + 1)(np.arange(3.0)).block_until_ready()
  assert counter.count == 1  # it counts
  sampled('T=1')
  keys, others = [key_for(0, 'rollout', step) for step in range(3)], favouring(tiny_variables(MODEL, 1), EOS, 1.0)
  jax.block_until_ready((keys, others))
  before = counter.count
  for step, key in enumerate(keys):
    rng = np.random.default_rng(step)
    lengths = rng.integers(1, WIDTH + 1, 5).astype(np.int32)
    prompts = rng.integers(2, 64, (5, WIDTH)).astype(np.int32)
    jax.block_until_ready(sampler('T=1')(others, prompts, lengths, rng.integers(0, 99, 5).astype(np.int32), key))
  assert counter.count == before


@pytest.mark.parametrize('rows, over, few', [(16, 1, 6), (16, 4, 8), (32, 8, 16), (8, 8, 0), (2, 1, 1), (1, 1, 0)])
def test_the_last_rows_go_on_in_a_number_that_the_devices_divide(rows, over, few):
  """Three eighths of 16 rows are 6, which four devices do not divide; where all rows would go on, none are parted."""
  layout = Layout(AbstractMesh((over, 1, 1, 1), AXES)) if over > 1 else None
  assert few_of(rows, layout) == few
