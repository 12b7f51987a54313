"""Expert compute: three forms of one sum, none of which drops a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rl.models import moe

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 40, 8, 6, 6, 2
NOBODY = EXPERTS  # marks a pair that computes nothing
PATHS = ('dense', 'rounds', 'ragged')
# float32: sums of 8 products in another order, relative to the largest entry of the array.
RELATIVE = 1e-5


def routings() -> dict[str, np.ndarray]:
  """int32 [N, K] by name."""
  rng = np.random.default_rng(0)
  uneven = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
  padded = uneven.copy()
  padded[rng.permutation(TOKENS)[:17]] = NOBODY
  one = np.full((TOKENS, TOP_K), NOBODY)
  one[:, 0] = 3
  routes = {
    'random': uneven,
    'two experts take all': np.tile([5, 1], (TOKENS, 1)),
    'one expert takes every token': one,
    'one expert takes every pair': np.full((TOKENS, TOP_K), 2),
    'some experts get none': np.where(uneven < 3, uneven, uneven - 3),
    'padding': padded,
    'a single real token': np.where(np.arange(TOKENS)[:, None] == 11, [0, 4], NOBODY),
    'no real token': np.full((TOKENS, TOP_K), NOBODY),
  }
  return {name: route.astype(np.int32) for name, route in routes.items()}


ROUTINGS = routings()


@functools.cache
def layer(dtype: str = 'float32'):
  """(x, gate, three weights, cotangent)."""
  rng = np.random.default_rng(1)
  shapes = ((TOKENS, WIDTH), (TOKENS, TOP_K), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN),
            (EXPERTS, HIDDEN, WIDTH), (TOKENS, WIDTH))
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def by_definition(x, picked, gate, w_gate, w_up, w_down):
  """The sum as it is written, with every pair's own weights gathered; an expert of zeros for NOBODY."""
  w_gate, w_up, w_down = (jnp.pad(w, ((0, 1), (0, 0), (0, 0)))[picked] for w in (w_gate, w_up, w_down))
  hidden = jax.nn.silu(jnp.einsum('nd,nkdf->nkf', x, w_gate)) * jnp.einsum('nd,nkdf->nkf', x, w_up)
  return jnp.einsum('nkf,nkfd,nk->nd', hidden, w_down, gate)


@functools.partial(jax.jit, static_argnames='path')
def value_and_gradients(path, picked, x, gate, w_gate, w_up, w_down, cotangent):
  """(y, gradients by x, gate and the three weights); path 'definition' is the reference."""
  def f(x, gate, *weights):
    if path == 'definition':
      return by_definition(x, picked, gate, *weights)
    return moe.experts(x, picked, gate, *weights, path)
  y, vjp = jax.vjp(f, x, gate, w_gate, w_up, w_down)
  return y, vjp(cotangent)


def further_rounds(picked) -> int:
  """Rounds after the first that the overflow needs."""
  slots, block, group = moe._sizes(picked.size, EXPERTS)
  over = np.maximum(np.bincount(picked.reshape(-1), minlength=EXPERTS + 1)[:-1] - slots, 0)
  return -(-int((-(-over // block)).sum()) // group)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('name', ROUTINGS)
def test_every_path_gives_the_defined_sum_and_all_its_gradients(path, name):
  wanted = value_and_gradients('definition', ROUTINGS[name], *layer())
  got = value_and_gradients(path, ROUTINGS[name], *layer())
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert np.abs(a - b).max() <= RELATIVE * np.abs(b).max()  # 0 where all is padding


@pytest.mark.parametrize('name', ROUTINGS)
def test_gate_and_up_weights_are_not_copied_side_by_side_where_they_are_large(name, monkeypatch):
  """And then give the same: sums over the width and over both halves in another order, within `RELATIVE`."""
  def joins() -> bool:
    jax.clear_caches()
    program = jax.make_jaxpr(lambda *a: moe.experts(a[0], ROUTINGS[name], *a[1:], 'rounds'))(*layer()[:-1])
    return f'{EXPERTS},{WIDTH},{2 * HIDDEN}]' in str(program)
  wanted = value_and_gradients('rounds', ROUTINGS[name], *layer())
  assert joins()
  monkeypatch.setattr(moe, 'JOINED_BELOW', 0)
  assert not joins()
  got = value_and_gradients('rounds', ROUTINGS[name], *layer())
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert np.abs(a - b).max() <= RELATIVE * np.abs(b).max()
  monkeypatch.undo()
  jax.clear_caches()  # other tests trace anew


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('name', ['one expert takes every token', 'one expert takes every pair', 'padding'])
def test_no_token_is_dropped(path, name):
  """Against a plain loop over tokens in float64."""
  picked = ROUTINGS[name]
  x, gate, w_gate, w_up, w_down, _ = (np.asarray(a, np.float64) for a in layer())
  wanted = np.zeros((TOKENS, WIDTH))
  for n in range(TOKENS):
    for k in range(TOP_K):
      e = picked[n, k]
      if e != NOBODY:
        a = x[n] @ w_gate[e]
        wanted[n] += gate[n, k] * ((a / (1 + np.exp(-a)) * (x[n] @ w_up[e])) @ w_down[e])
  got, _ = value_and_gradients(path, picked, *layer())
  np.testing.assert_allclose(got, wanted, rtol=0, atol=RELATIVE * np.abs(wanted).max())
  real = (picked != NOBODY).any(-1)
  assert (np.abs(got[real]).max(-1) > 0).all() and not np.asarray(got)[~real].any()


def test_these_routings_overflow_one_round_where_they_should():
  """Otherwise the tests above would say nothing of further rounds."""
  needed = {name: further_rounds(picked) for name, picked in ROUTINGS.items()}
  assert needed['random'] == needed['no real token'] == 0
  assert needed['one expert takes every token'] >= 2 and needed['one expert takes every pair'] >= 6


@pytest.mark.parametrize('path', PATHS)
def test_a_pair_that_computes_nothing_gets_no_gradient_and_gives_none(path):
  picked = ROUTINGS['padding']
  _, (dx, dgate, *_) = value_and_gradients(path, picked, *layer())
  nobody = (picked == NOBODY).all(-1)
  assert nobody.sum() == 17 and not np.asarray(dx)[nobody].any() and not np.asarray(dgate)[nobody].any()
  _, (_, _, *dweights) = value_and_gradients(path, ROUTINGS['no real token'], *layer())
  assert not any(np.asarray(w).any() for w in dweights)


@pytest.mark.parametrize('path', PATHS)
def test_an_expert_that_nobody_picks_gets_exactly_no_gradient(path):
  picked = ROUTINGS['some experts get none']
  idle = np.bincount(picked.reshape(-1), minlength=EXPERTS) == 0
  assert idle.sum() == 3
  _, (_, _, *dweights) = value_and_gradients(path, picked, *layer())
  for gradient in dweights:
    assert not np.asarray(gradient)[idle].any() and np.asarray(gradient)[~idle].any(axis=(1, 2)).all()


@pytest.mark.parametrize('path', PATHS)
def test_bfloat16_runs_and_stays_within_its_precision(path):
  picked = ROUTINGS['random']
  exact, _ = value_and_gradients('definition', picked, *layer())
  y, gradients = value_and_gradients(path, picked, *layer('bfloat16'))
  assert {a.dtype for a in (y, *gradients)} == {jnp.dtype('bfloat16')}
  # 8 bits: 2^-9 a rounding, of inputs, of three products and of the sum.
  assert np.abs(y.astype(jnp.float32) - exact).max() < 0.02 * np.abs(exact).max()


def test_the_automatic_path_fits_the_number_of_tokens_on_cpu():
  if jax.default_backend() != 'cpu':
    pytest.skip('elsewhere it is always ragged')
  x, gate, *weights, _ = layer()

  def program(tokens, path):
    picked = ROUTINGS['random'][:tokens]
    return str(jax.make_jaxpr(lambda: moe.experts(x[:tokens], picked, gate[:tokens], *weights, path))())
  assert program(TOKENS, 'auto') == program(TOKENS, 'rounds') != program(TOKENS, 'dense')
  assert program(8, 'auto') == program(8, 'dense') != program(8, 'rounds')
