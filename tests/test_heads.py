"""Log-probabilities and entropies: chunked or not, truncated or not, and no [tokens, vocabulary] array."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import run_jit

from moe_rl.models.heads import DIVERGENCES, distribution, support_mask, taught, token_logprobs

ROWS, TOKENS, WIDTH, VOCAB = 3, 7, 8, 40  # 21 tokens: a chunk of 5 leaves a last one with padding
TRUNCATIONS = [dict(), dict(top_k=5), dict(top_p=0.8), dict(temperature=1.5, top_k=9, top_p=0.6)]
FLOAT32 = dict(rtol=1e-5, atol=2e-6)  # sums over 40 logits of size 5 in another order: a few roundings of 6e-8 x 5
MODES = dict(argnames='truncation', argvalues=TRUNCATIONS, ids=lambda t: ' '.join(map(str, t.items())) or 'plain')


def inputs(seed: int = 0):
  """(hidden, targets, unembedding)."""
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
  return hidden, rng.integers(0, VOCAB, (ROWS, TOKENS)), rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)


def direct(hidden, targets, unembed, temperature=1.0, top_k=0, top_p=1.0):
  """(log-prob, entropy) from the distribution that is sampled from, whole."""
  logp = distribution(hidden @ unembed, temperature, top_k, top_p)
  entropy = -jnp.where(jnp.isfinite(logp), jnp.exp(logp) * jnp.where(jnp.isfinite(logp), logp, 0), 0).sum(-1)
  return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], entropy


@functools.partial(jax.jit, static_argnames=('chunk', 'temperature', 'top_k', 'top_p'))
def value_and_gradients(hidden, targets, unembed, chunk, **truncation):
  """((log-probs, entropies), gradients of a weighted sum of both by hidden and by unembed); chunk None: `direct`."""
  def loss(hidden, unembed):
    if chunk is None:
      logp, entropy = direct(hidden, targets, unembed, **truncation)
    else:
      logp, entropy = token_logprobs(lambda h: h @ unembed, hidden, targets, chunk=chunk, **truncation)
    weight = jnp.arange(targets.size, dtype=jnp.float32).reshape(targets.shape)
    return (weight * (logp - 0.3 * entropy)).sum(), (logp, entropy)
  gradients, values = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, unembed)
  return values, gradients


def likely_targets(hidden, unembed):
  """The likeliest token: inside every support."""
  return np.argmax(hidden @ unembed, axis=-1)


def assert_close(got, wanted):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **FLOAT32 | dict(atol=2e-6 * max(1, np.abs(b).max()))),
               got, wanted)


@pytest.mark.parametrize(**MODES)
def test_chunked_equals_unchunked_equals_the_sampled_distribution(truncation):
  hidden, targets, unembed = inputs()
  if truncation.keys() & {'top_k', 'top_p'}:
    targets = likely_targets(hidden, unembed)
  whole = value_and_gradients(hidden, targets, unembed, None, **truncation)
  for chunk in (5, 4096):
    assert_close(value_and_gradients(hidden, targets, unembed, chunk, **truncation), whole)


def test_plain_log_probs_and_entropies_are_those_of_log_softmax():
  hidden, targets, unembed = inputs(1)
  logits = hidden.astype(np.float64) @ unembed
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  got, entropy = token_logprobs(lambda h: h @ unembed, hidden, targets, chunk=8)
  assert got.shape == entropy.shape == (ROWS, TOKENS) and got.dtype == entropy.dtype == jnp.float32
  np.testing.assert_allclose(got, np.take_along_axis(logp, targets[..., None], -1)[..., 0], **FLOAT32)
  np.testing.assert_allclose(entropy, -(np.exp(logp) * logp).sum(-1), **FLOAT32)


def test_a_target_outside_the_support_counts_as_though_it_were_in():
  hidden, _, unembed = inputs(2)
  logits = hidden @ unembed
  targets = np.argmin(logits, axis=-1)
  got, _ = token_logprobs(lambda h: h @ unembed, hidden, targets, top_k=5)
  top = np.sort(logits, axis=-1)[..., -5:]
  own = logits.min(-1)
  wanted = own - np.log(np.exp(top).sum(-1) + np.exp(own))
  np.testing.assert_allclose(got, wanted, **FLOAT32)
  (_, _), gradients = value_and_gradients(hidden, targets, unembed, 5, top_k=5)
  assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize('probabilities, top_k, top_p, kept', [
    ([0.5, 0.3, 0.15, 0.05], 0, 1.0, [1, 1, 1, 1]),  # off
    ([0.15, 0.5, 0.05, 0.3], 2, 1.0, [0, 1, 0, 1]),
    ([0.15, 0.5, 0.05, 0.3], 9, 1.0, [1, 1, 1, 1]),  # more than there are
    ([0.4, 0.2, 0.2, 0.2], 2, 1.0, [1, 1, 1, 1]),  # equals of the last one kept stay, whatever their order
    ([0.15, 0.5, 0.05, 0.3], 0, 0.45, [0, 1, 0, 0]),  # the likeliest alone reaches 0.45
    ([0.15, 0.5, 0.05, 0.3], 0, 0.55, [0, 1, 0, 1]),
    ([0.15, 0.5, 0.05, 0.3], 0, 0.90, [1, 1, 0, 1]),
    ([0.15, 0.5, 0.05, 0.3], 0, 1e-9, [0, 1, 0, 0]),  # never empty
    ([0.25, 0.25, 0.25, 0.25], 0, 0.3, [1, 1, 1, 1]),  # ties
    # What top-k leaves counts as the whole: 0.5 + 0.3 of 0.95 is 0.84, but 0.8 of 1 without top-k.
    ([0.15, 0.5, 0.05, 0.3], 3, 0.82, [0, 1, 0, 1]),
    ([0.15, 0.5, 0.05, 0.3], 0, 0.82, [1, 1, 0, 1]),
])
def test_the_support_is_the_hand_computed_one(probabilities, top_k, top_p, kept):
  mask = support_mask(jnp.log(jnp.array([probabilities, probabilities])), top_k, top_p)
  assert mask.astype(int).tolist() == [kept, kept]


def test_the_sampled_distribution_is_renormalised_over_its_support():
  logits = jnp.log(jnp.array([0.15, 0.5, 0.05, 0.3]))
  p = np.exp(distribution(logits, 1.0, top_k=2))
  np.testing.assert_allclose(p, [0, 0.625, 0, 0.375], rtol=1e-6)  # 0.5 / 0.8, 0.3 / 0.8; float32 logs and exps
  p = np.exp(distribution(logits, 0.5))
  np.testing.assert_allclose(p, np.square([0.15, 0.5, 0.05, 0.3]) / 0.365, rtol=1e-6)
  # Temperature comes before truncation: at T = 0.5 the likeliest has 0.68 of the mass and reaches 0.6 alone.
  assert np.exp(distribution(logits, 0.5, top_p=0.6)).tolist() == [0, 1, 0, 0]


def largest_float_array(chunk: int, teacher: bool) -> int:
  """Elements of the largest float array in the optimised program of values and gradients: 64 tokens, 96 words."""
  hidden, targets, unembed = jnp.zeros((4, 16, 4)), jnp.zeros((4, 16), jnp.int32), jnp.zeros((4, 96))
  if teacher:
    as_run = run_jit(taught_values.__wrapped__, static_argnames=('divergence', 'chunk'))
    compiled = as_run.lower(hidden, targets, unembed, hidden, unembed, 'reverse', chunk).compile()
  else:
    as_run = run_jit(value_and_gradients.__wrapped__, static_argnames='chunk')
    compiled = as_run.lower(hidden, targets, unembed, chunk).compile()
  shapes = re.findall(r'\b(?:f|bf)\d+\[([\d,]+)\]', compiled.as_text())
  return max(int(np.prod([int(n) for n in shape.split(',')])) for shape in shapes)


@pytest.mark.parametrize('teacher', [False, True])
def test_no_array_of_tokens_by_vocabulary_exists_when_chunked(teacher):
  # So the reading of the program sees such an array where one is.
  assert largest_float_array(chunk=64, teacher=teacher) >= 64 * 96
  assert largest_float_array(chunk=8, teacher=teacher) == 8 * 96


# Against a teacher.


@functools.partial(jax.jit, static_argnames=('divergence', 'chunk'))
def taught_values(hidden, targets, unembed, teacher_hidden, teacher_unembed, divergence, chunk):
  """((log-probs, right, divergences), gradients of a weighted sum by hidden, unembed and the teacher's two)."""
  weight = jnp.arange(targets.size, dtype=jnp.float32).reshape(targets.shape)

  def loss(hidden, unembed, teacher_hidden, teacher_unembed):
    out = taught(lambda h: h @ unembed, hidden, targets, (lambda h: h @ teacher_unembed, teacher_hidden), divergence,
                 chunk=chunk)
    return (weight * (out[0] - 0.3 * out[2])).sum(), out
  gradients, values = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(hidden, unembed, teacher_hidden,
                                                                         teacher_unembed)
  return values, gradients


@pytest.mark.parametrize('divergence', DIVERGENCES)
def test_divergences_and_their_gradients_are_the_hand_computed_ones_chunked_or_not(divergence):
  hidden, targets, unembed = inputs(3)
  targets[0] = np.argmax(hidden[0] @ unembed, axis=-1)
  teacher_hidden, _, teacher_unembed = inputs(4)
  teacher_hidden, teacher_unembed = teacher_hidden[..., :5], teacher_unembed[:5]  # another width
  log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (
    hidden.astype(np.float64) @ unembed, teacher_hidden.astype(np.float64) @ teacher_unembed))
  p, q = np.exp(log_p), np.exp(log_q)
  kl = (q * (log_q - log_p) if divergence == 'forward' else p * (log_p - log_q)).sum(-1)
  right = targets == p.argmax(-1)
  by_logits = p - q if divergence == 'forward' else p * (log_p - log_q - kl[..., None])
  weight = np.arange(targets.size).reshape(*targets.shape, 1)
  slope = weight * (np.eye(VOCAB)[targets] - p - 0.3 * by_logits)
  wanted = ((np.take_along_axis(log_p, targets[..., None], -1)[..., 0], right, kl),
            (slope @ unembed.T, np.einsum('ntd,ntv->dv', hidden, slope), np.zeros(teacher_hidden.shape),
             np.zeros(teacher_unembed.shape)))
  assert 0 < right.mean() < 1 and kl.min() > 0.1
  for chunk in (5, 4096):
    got = taught_values(hidden, targets, unembed, teacher_hidden, teacher_unembed, divergence, chunk)
    assert all(x.dtype == jnp.float32 for x in got[0])
    assert_close(got, wanted)


def test_without_a_teacher_the_log_probs_are_the_same_and_nothing_diverges():
  hidden, targets, unembed = inputs(3)
  logp, right, apart = taught(lambda h: h @ unembed, hidden, targets, chunk=8)
  assert_close(logp, token_logprobs(lambda h: h @ unembed, hidden, targets, chunk=8)[0])
  np.testing.assert_array_equal(right, targets == np.argmax(hidden @ unembed, axis=-1))
  assert not apart.any()
