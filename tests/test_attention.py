"""Positions and latent attention: YaRN's published numbers, and one model whichever way a token is computed."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import AS_IN_A_RUN

from moe_rl.models import attend as attention
from moe_rl.models.attend import attend, kernel_blocks, query_block
from moe_rl.models.attention import MLA, LatentCache
from moe_rl.models.config import Yarn, preset, yarn_magnitude
from moe_rl.models.rope import TABLE, frequencies, rotate, yarn_range
from moe_rl.models.transformer import Transformer, init
from moe_rl.runtime.mesh import Layout, make_mesh

MINIATURE = dict(vocab_size=64, width=32, dense_ff=48, heads=2, kv_lora=16, nope_dim=8, rope_dim=8, v_dim=8,
                 expert_ff=16, layers=2, mtp_layers=0)
# original_length 16 puts the ramp inside the 4 pairs: the first turns as before, the last 8 times slower.
UNEQUAL_YARN = Yarn(factor=8.0, original_length=16, beta_fast=2.0, beta_slow=0.25, mscale=1.0, mscale_all_dim=0.5)
VARIANTS = {
  'direct queries': dict(),
  'low-rank queries, unequal YaRN, groups of experts': dict(
    q_lora=24, yarn=UNEQUAL_YARN, groups=4, kept_groups=2, route_scale=2.5),
  'softmax router, YaRN': dict(yarn=Yarn(original_length=16), score='softmax', norm_top_k=False),
}
LENGTHS = np.array([5, 12, 2], np.int32)  # tokens of the prompts of one batch, right-padded to 13
PADDED, GROUP, NEW = 13, 2, 6

# The two forms differ in the order of float32 sums only: some 1e-6 nats at logits of size 5. (The same comparison in
# float64 gives 1e-14.) The sampler and the trainer may differ by 1e-4 at most.
NATS = 1e-5


def random_variables(config, seed: int) -> dict:
  """Weights with twice the presets' gain a layer, norms' scales around 1, selection biases of both signs."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    centre, spread = (1.0, 0.3) if 'scale' in name else (0.0, 0.3 if 'bias' in name else 0.2)
    return jnp.asarray(rng.normal(centre, spread, leaf.shape), leaf.dtype)
  shapes = nn.unbox(jax.eval_shape(lambda key: init(config, key), jax.random.key(0)))
  return jax.tree_util.tree_map_with_path(fill, shapes)


class Ways:
  """One batch of prompts with two completions each, computed as the trainer, the prefill and the decoder do."""

  def __init__(self, options: dict, **changes):
    self.config = config = preset('tiny', **{**MINIATURE, **changes})
    self.net, self.variables = Transformer(config), random_variables(config, seed=3)
    rng = np.random.default_rng(4)
    self.prompts = rng.integers(1, 64, (3, PADDED)).astype(np.int32)
    self.completions = rng.integers(1, 64, (3, GROUP, NEW)).astype(np.int32)
    self.forward = jax.jit(self.forward_, compiler_options=options)
    self.step = jax.jit(self.step_, compiler_options=options)

  def forward_(self, ids, lengths):
    """(logits [N, T, V], cells [L, N, T, Z]) of right-padded rows."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    out = self.net.apply(self.variables, ids, positions, segments, with_cells=True)
    return self.net.apply(self.variables, out.hidden_NxTxD, method=self.net.logits), out.cells_LxNxTxZ

  def step_(self, ids_BxG, cache):
    hidden, cache = self.net.apply(self.variables, ids_BxG, cache, method=self.net.decode)
    return self.net.apply(self.variables, hidden, method=self.net.logits), cache

  def rows(self):
    """(ids [B G, P + S], lengths [B G]): each prompt with each completion, as the trainer sees them."""
    ids = np.zeros((3 * GROUP, PADDED + NEW), np.int32)
    for b, length in enumerate(LENGTHS):
      for g in range(GROUP):
        ids[b * GROUP + g, :length + NEW] = [*self.prompts[b, :length], *self.completions[b, g]]
    return ids, np.repeat(LENGTHS, GROUP) + NEW

  def prefill(self):
    """(logits [B, P, V], cache of the prompts)."""
    logits, cells = self.forward(self.prompts, LENGTHS)
    own = jnp.zeros((self.config.layers, 3, GROUP, NEW, self.config.latent_dim), cells.dtype)
    return np.asarray(logits), LatentCache(cells, own, jnp.asarray(LENGTHS), jnp.zeros((), jnp.int32))

  def decode(self, cache, tokens: int):
    """(logits [B, G, S, V] after each of the first S tokens of the completions, the cache then)."""
    logits = []
    for s in range(tokens):
      now, cache = self.step(self.completions[:, :, s], cache)
      logits.append(now)
    return np.stack(logits, axis=2), cache


@functools.cache
def ways_of(variant: str) -> Ways:
  # The first as it is really run, the others compiled more quickly.
  return Ways(AS_IN_A_RUN if variant == 'direct queries' else {}, **VARIANTS[variant])


@pytest.fixture(scope='module')
def part_filled():
  """(the ways of one model, its cache after three decoded tokens)."""
  ways = ways_of('low-rank queries, unequal YaRN, groups of experts')
  return ways, ways.decode(ways.prefill()[1], 3)[1]


def logp(logits):
  """Nats, in float64: the comparison adds no rounding."""
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize('variant', VARIANTS)
def test_decode_and_prefill_equal_the_training_forward(variant):
  """Absorbed on the latent cache, token by token, against naive over whole rows: nats, logits and cached cells."""
  ways = ways_of(variant)
  logits, cells = (np.asarray(x) for x in ways.forward(*ways.rows()))
  logits = logits.reshape(3, GROUP, PADDED + NEW, -1)
  cells = cells.reshape(ways.config.layers, 3, GROUP, PADDED + NEW, -1)
  prefilled, cache = ways.prefill()
  decoded, cache = ways.decode(cache, NEW)
  assert int(cache.own_length) == NEW
  prompt_cells, own_cells = np.asarray(cache.prompt_LxBxPxZ), np.asarray(cache.own_LxBxGxSxZ)
  for b, length in enumerate(LENGTHS):
    for g in range(GROUP):
      wanted, got = logits[b, g, :length + NEW], np.concatenate([prefilled[b, :length], decoded[b, g]])
      assert np.abs(logp(got) - logp(wanted)).max() <= NATS
      np.testing.assert_allclose(got, wanted, rtol=0, atol=2 * NATS)  # 1.01e-5 of 5 with jax 0.12
      cached = np.concatenate([prompt_cells[:, b, :length], own_cells[:, b, g]], axis=1)
      np.testing.assert_allclose(cached, cells[:, b, g, :length + NEW], rtol=0, atol=NATS)
  apart = np.abs(logp(decoded[:, 0]) - logp(decoded[:, 1])).max(axis=(1, 2))
  assert (apart > 0.5).all()  # the completions of a prompt are not the same to the model


@pytest.mark.parametrize('variant', VARIANTS)
def test_attention_alone_is_the_same_naive_and_absorbed(variant):
  """Without the layers around it, so that no norm or residual hides a difference."""
  ways, rng = ways_of(variant), np.random.default_rng(5)
  config = ways.config
  layer = MLA(config)
  params = {'params': jax.tree.map(lambda leaf: leaf[0], ways.variables['params']['moe']['attention'])}
  x = rng.normal(size=(2, 7, config.width)).astype(np.float32)
  positions = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))

  @jax.jit
  def both(x):
    naive, cells = layer.apply(params, x, positions, jnp.ones((2, 7), jnp.int32))
    cell = layer.apply(params, x[:, 6:], positions[:, 6:], method=layer.cells)

    def absorbed(own, own_length, new):  # four cells are the prompt's
      return layer.apply(params, x[:, 6:], positions[:, 6:], cells[:, :4], own, jnp.full(2, 4), own_length, new,
                         method=layer.decode)
    apart, written = absorbed(cells[:, None, 4:6], 2, cell), absorbed(cells[:, None, 4:], 3, None)
    return naive[:, 6:], apart, written, cells[:, 6:], cell
  naive, apart, written, cells, cell = both(x)
  assert np.abs(naive).max() > 0.5
  for absorbed in (apart, written):
    np.testing.assert_allclose(absorbed, naive, rtol=0, atol=1e-5)  # entries of size 1, sums of some 100 products
  np.testing.assert_allclose(cell, cells, rtol=0, atol=1e-6)


def test_the_latent_norms_keep_their_own_epsilon_whatever_the_config_says():
  """The released models were run so; 1e-6 is nothing beside the mean square here, 100 would halve the output."""
  ways = ways_of('low-rank queries, unequal YaRN, groups of experts')
  params = {'params': jax.tree.map(lambda leaf: leaf[0], ways.variables['params']['moe']['attention'])}
  x = np.random.default_rng(6).normal(size=(1, 7, ways.config.width)).astype(np.float32)
  positions = np.arange(7, dtype=np.int32)[None]
  one, other = (MLA(config).apply(params, x, positions, np.ones_like(positions))[0]
                for config in (ways.config, dataclasses.replace(ways.config, norm_eps=100.0)))
  np.testing.assert_array_equal(one, other)


def test_the_cache_holds_latent_and_rotary_numbers_only(part_filled):
  ways, cache = part_filled
  config, cells = ways.config, 3 * PADDED + 3 * GROUP * NEW
  arrays = [leaf.size for leaf in jax.tree.leaves(cache) if leaf.dtype == jnp.float32]
  assert sum(arrays) == config.layers * cells * (config.kv_lora + config.rope_dim)


@pytest.mark.parametrize('name, numbers', [('v3_671b', 35_136), ('v2_lite_16b', 15_552), ('moonlight_16b', 15_552)])
def test_a_cached_token_of_a_released_model_costs_its_published_numbers(name, numbers):
  """layers x (512 + 64): 70.3 kB a token for V3 in bfloat16, 31.1 kB for the 16B models."""
  config = preset(name)
  ids = jax.ShapeDtypeStruct((1, 3), jnp.int32)
  shapes = jax.eval_shape(lambda key: nn.unbox(init(config, key)), jax.random.key(0))
  out = jax.eval_shape(lambda v, *a: Transformer(config).apply(v, *a, with_cells=True), shapes, ids, ids, ids)
  assert out.cells_LxNxTxZ.shape == (config.layers, 1, 3, 576)
  assert out.cells_LxNxTxZ.size == 3 * numbers and out.cells_LxNxTxZ.dtype == jnp.bfloat16


@pytest.mark.parametrize('part', ['own', 'prompt'])
def test_cells_past_their_length_change_nothing(part_filled, part):
  ways, cache = part_filled
  before, _ = ways.step(ways.completions[:, :, 3], cache)
  prompt, own = np.array(cache.prompt_LxBxPxZ), np.array(cache.own_LxBxGxSxZ)
  if part == 'own':
    own[:, :, :, int(cache.own_length):] = 1e4
  else:
    for b, length in enumerate(LENGTHS):
      prompt[:, b, length:] = 1e4
  after, _ = ways.step(ways.completions[:, :, 3], cache.replace(prompt_LxBxPxZ=prompt, own_LxBxGxSxZ=own))
  np.testing.assert_array_equal(after, before)  # a weight of exactly 0 times a finite number

  own[:, :, :, 1], prompt[:, :, 1] = 0, 0  # but cells within the length count
  after, _ = ways.step(ways.completions[:, :, 3], cache.replace(prompt_LxBxPxZ=prompt, own_LxBxGxSxZ=own))
  assert (np.abs(after - before).max(-1) > 1e-3).all()


def test_a_decoded_token_is_written_to_the_next_cell_and_to_no_other(part_filled):
  ways, cache = part_filled
  _, after = ways.step(ways.completions[:, :, 3], cache)
  assert int(after.own_length) == int(cache.own_length) + 1 == 4
  np.testing.assert_array_equal(after.prompt_LxBxPxZ, cache.prompt_LxBxPxZ)
  others = np.arange(NEW) != 3
  np.testing.assert_array_equal(after.own_LxBxGxSxZ[..., others, :], cache.own_LxBxGxSxZ[..., others, :])
  assert np.asarray(after.own_LxBxGxSxZ)[..., 3, :].any(-1).all()


def test_yarn_of_v3_keeps_the_fast_frequencies_and_divides_the_slow_ones_by_40():
  config = preset('v3_671b')
  assert yarn_range(64, 10_000.0, Yarn()) == (10, 23)
  plain = 10_000.0 ** (-np.arange(32) / 32)
  turned = frequencies(config)
  assert turned.dtype == np.float32 and turned.shape == (32,)
  np.testing.assert_allclose(turned[:11], plain[:11], rtol=1e-7)  # float32's half spacing is 6e-8
  np.testing.assert_allclose(turned[23:], plain[23:] / 40, rtol=1e-7)
  ramp = (17 - 10) / 13
  np.testing.assert_allclose(turned[17], plain[17] * (ramp / 40 + 1 - ramp), rtol=1e-7)
  assert (np.diff(turned) < 0).all()
  np.testing.assert_allclose(frequencies(preset('v3_671b', yarn=None)), plain, rtol=1e-7)


@pytest.mark.parametrize('name, changes, scale', [
    ('v3_671b', {}, 0.13523378), ('v2_lite_16b', {}, 0.11472139), ('v3_671b', dict(yarn=None), 0.0721688),
    ('moonlight_16b', {}, 0.0721688)])
def test_softmax_scales_are_those_of_the_released_models(name, changes, scale):
  assert preset(name, **changes).softmax_scale == pytest.approx(scale, abs=5e-9 if len(str(scale)) > 9 else 5e-8)


def test_yarn_magnitudes_are_the_published_ones():
  assert yarn_magnitude(40, 1.0) == pytest.approx(1.3688879, abs=5e-8)
  assert yarn_magnitude(40, 0.707) == pytest.approx(1.2608038, abs=5e-8)
  assert yarn_magnitude(1.0, 1.0) == 1.0


@pytest.mark.parametrize('yarn, magnitude', [(None, 1.0), (Yarn(), 1.0), (
    UNEQUAL_YARN, (1 + 0.1 * np.log(8)) / (1 + 0.05 * np.log(8)))])
def test_rotation_keeps_norms_up_to_yarns_magnitude(yarn, magnitude):
  config, rng = preset('tiny', rope_dim=8, yarn=yarn, max_length=100_000), np.random.default_rng(0)
  x = rng.normal(size=(3, 5, 2, 8)).astype(np.float32)
  positions = rng.integers(0, 100_000, (3, 5)).astype(np.int32)
  norms = np.linalg.norm(rotate(x, positions, config), axis=-1)
  np.testing.assert_allclose(norms, magnitude * np.linalg.norm(x, axis=-1), rtol=1e-6)  # sums of 8 float32 squares
  np.testing.assert_allclose(rotate(x, 0 * positions, config), magnitude * x, rtol=1e-6)


@pytest.mark.parametrize('yarn', [None, UNEQUAL_YARN])
def test_looked_up_rotations_are_the_computed_ones(yarn):
  few = preset('tiny', yarn=yarn, max_length=TABLE)
  many = dataclasses.replace(few, max_length=TABLE + 1)
  x = np.random.default_rng(0).normal(size=(2, TABLE // 2, 3, few.rope_dim)).astype(np.float32)
  positions = np.arange(TABLE, dtype=np.int32).reshape(2, -1)
  # XLA's and numpy's cosines of the same float32 angle differ by an ulp or two of 1.
  np.testing.assert_allclose(rotate(x, positions, few), rotate(x, positions, many), rtol=0, atol=2e-6)
  beyond = rotate(x[:1, :2], jnp.array([[TABLE - 1, TABLE]]), few)
  assert np.isfinite(beyond[0, 0]).all() and np.isnan(beyond[0, 1]).all()


@pytest.mark.parametrize('yarn', [None, UNEQUAL_YARN])
def test_scores_depend_on_the_difference_of_positions_only(yarn):
  config, rng = preset('tiny', rope_dim=8, yarn=yarn, max_length=4096), np.random.default_rng(1)
  query, key = rng.normal(size=(2, 1, 8)).astype(np.float32)

  def score(at_query, at_key):
    turned = [rotate(x, jnp.array([at]), config) for x, at in ((query, at_query), (key, at_key))]
    return float((turned[0] * turned[1]).sum())
  for difference in (0, 1, 7, 500):
    # float32 angles at position 3,000 are off by 2^-13 rad at most; scores are of size 3.
    near, *far = (score(at + difference, at) for at in (0, 5, 64, 3000))
    assert far == pytest.approx([near] * 3, abs=2e-3)
  assert abs(score(0, 0) - score(7, 0)) > 0.1


def test_interleaved_rotation_equals_half_split_on_permuted_weights():
  """Released checkpoints turn pairs (2i, 2i + 1) as complex numbers; with their columns permuted ours scores alike."""
  config, rng = preset('v3_671b'), np.random.default_rng(2)
  x = rng.normal(size=(6, 16)).astype(np.float32)
  w_query, w_key = rng.normal(size=(2, 16, 64)).astype(np.float32)
  positions = np.array([0, 1, 5, 17, 100, 801])
  half_split = np.concatenate([np.arange(0, 64, 2), np.arange(1, 64, 2)])

  def interleaved(y):
    turned = (y[:, 0::2] + 1j * y[:, 1::2]) * np.exp(1j * positions[:, None] * frequencies(config).astype(np.float64))
    return np.stack([turned.real, turned.imag], axis=-1).reshape(y.shape)
  wanted = interleaved(x @ w_query) @ interleaved(x @ w_key).T
  query, key = (rotate(x @ w[:, half_split], jnp.asarray(positions), config) for w in (w_query, w_key))
  np.testing.assert_allclose(query @ key.T, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())  # float32 angles
  np.testing.assert_allclose(query, interleaved(x @ w_query)[:, half_split], rtol=0, atol=1e-3)  # of size 10


def test_long_rows_go_by_blocks_and_give_the_defined_attention_and_its_gradients():
  """Segments cross the edges of blocks. Sums over 600 keys in another order: 1e-5 of
  the largest entry."""
  length = 600
  assert query_block(length) == 150 and query_block(128) == 64 and query_block(65536) == 4096
  q, k, v, weight = jax.random.normal(jax.random.key(0), (4, 1, length, 2, 4))
  segment = np.searchsorted([100, 300, 512], np.arange(length), side='right')
  visible = jnp.asarray((segment[:, None] == segment) & np.tri(length, dtype=bool))[None, None]

  def defined(q, k, v):
    score = jnp.where(visible, jnp.einsum('nthd,nshd->nhts', q, k), -jnp.inf)
    return jnp.einsum('nhts,nshd->nthd', jax.nn.softmax(score, axis=-1), v)
  got, pull = jax.vjp(lambda *x: attend(*x, jnp.asarray(segment)[None]), q, k, v)
  wanted, pull_wanted = jax.vjp(defined, q, k, v)
  for a, b in zip((got, *pull(weight)), (wanted, *pull_wanted(weight)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize('unit', [128, 512])
def test_the_tpu_kernel_gives_the_same_attention_and_gradients_padded_to_its_unit(unit, monkeypatch):
  """JAX's kernel, interpreted, against blocks in plain XLA, with packed segments and keys wider than values. Sums in
  float32 differ by their order: some 1e-6 of numbers around 1."""
  monkeypatch.setattr(attention, 'LONG', 256)
  monkeypatch.setattr(attention, 'LONG_UNIT', unit)
  rng = np.random.default_rng(0)
  q, k, v = (jnp.array(rng.normal(size=(2, 300, 2, d)) / d**0.25, jnp.float32) for d in (24, 24, 16))
  segments = jnp.array(np.sort(rng.integers(0, 3, (2, 300)), axis=1))
  weights = jnp.array(rng.normal(size=v.shape), jnp.float32)
  layout = Layout(make_mesh({'data': 1, 'fsdp': 1, 'expert': 1, 'tensor': 1}, jax.devices()[:1]))

  def of(form):
    def total(q, k, v):
      out = form(q, k, v)
      return (out * weights).sum(), out
    (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients
  kernel = of(lambda q, k, v: attention._kernel(layout, q, k, v, segments, interpret=True))
  for got, wanted in zip(kernel, of(lambda q, k, v: attend(q, k, v, segments)), strict=True):
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_blocks_of_the_tpu_kernel_divide_the_row_are_few_and_fit_its_memory():
  """Keys of 192 and values of 128, which take 384 lanes; a block of keys holds 12 bytes a lane in bfloat16, 20 in
  float32, and the kernel has 16 MiB for it and its tiles."""
  assert kernel_blocks(33_792, 192, 128, 2) == (512, 1536)  # 3,072 leave fewer gradients to add up, and do not fit
  assert kernel_blocks(66_560, 192, 128, 2) == (512, 2560)
  assert kernel_blocks(4096, 192, 128, 2) == (512, 1024)
  assert kernel_blocks(640, 192, 128, 2) == (128, 640)
  for itemsize in (2, 4):
    for length in range(9 * 1024, 66 * 1024, 1024):
      block, wide = kernel_blocks(length, 192, 128, itemsize)
      assert length % wide == wide % block == 0 and wide >= 1024, length
      assert wide * 384 * (4 * itemsize + 4) <= 12 * 2**20, length
