"""Dense models with grouped queries: sizes, the attention itself, one model whichever way a token is computed."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from tiny import tiny_variables

from moe_rl.models.attention import LatentCache
from moe_rl.models.config import (
  GQA_FIELDS,
  MLA_FIELDS,
  MOE_FIELDS,
  PRESETS,
  Llama3Rope,
  ModelConfig,
  Yarn,
  from_fields,
  own_fields,
  preset,
)
from moe_rl.models.gqa import GQA
from moe_rl.models.rope import frequencies
from moe_rl.models.transformer import Transformer, parameter_count
from moe_rl.runtime.costs import forward_flops
from moe_rl.runtime.state import make_optimizer

# Everything that a dense model can have, at once. Rows of 18 tokens go beyond the 8 of the original context.
SIZES = dict(
  attention='gqa', vocab_size=64, layers=2, dense_layers=2, width=32, dense_ff=48, heads=6, kv_heads=2, head_dim=8,
  qkv_bias=True, qk_norm=True, tied=True, rope_theta=100.0, llama3=Llama3Rope(original_length=8), init_std=0.3,
  norm_eps=0.01, max_length=64)
LENGTHS, PADDED, GROUP, NEW = np.array([5, 12, 2], np.int32), 12, 2, 6
NATS = 1e-5  # float32 sums in another order; the sampler and the trainer may differ by 1e-4 at most


def dense(**changes) -> ModelConfig:
  return ModelConfig(**SIZES | changes)


def variables_of(model: ModelConfig) -> dict:
  """Scales of 0.5 to 1.5, so that a norm in the wrong place shows."""
  rng = np.random.default_rng(1)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype) if path[-1].key == 'scale' else x,
    tiny_variables(model))


# Sizes.


@pytest.mark.parametrize('name, count', [
  ('qwen2_5_1_5b', 1_543_714_304), ('qwen2_5_math_1_5b', 1_543_714_304), ('r1_distill_qwen_1_5b', 1_777_088_000),
  ('qwen2_5_7b', 7_615_616_512), ('qwen2_5_math_7b', 7_615_616_512), ('qwen2_5_14b', 14_770_033_664),
  ('qwen2_5_32b', 32_763_876_352), ('llama3_1_8b', 8_030_261_248), ('llama3_3_70b', 70_553_706_496),
  ('qwen3_0_6b', 596_049_920), ('qwen3_1_7b', 1_720_574_976)])
def test_a_dense_preset_has_exactly_the_parameters_of_the_released_model(name, count):
  assert parameter_count(preset(name)) == count


@pytest.mark.parametrize('name, numbers', [('qwen2_5_1_5b', 512), ('qwen2_5_7b', 1024), ('llama3_3_70b', 2048)])
def test_a_cached_token_is_every_key_and_value_head(name, numbers):
  assert preset(name).latent_dim == numbers


@pytest.mark.parametrize('name', PRESETS)
def test_a_config_shows_what_its_kind_reads_and_comes_back_from_it(name):
  model = preset(name)
  shown = own_fields(model)
  assert from_fields(shown) == model == from_fields(dataclasses.asdict(model))
  hidden = {'attention', 'tied', *GQA_FIELDS} if model.attention == 'mla' else {*MLA_FIELDS, *MOE_FIELDS}
  assert shown.keys() == {f.name for f in dataclasses.fields(model)} - hidden - {'head'}  # a language model's


def test_what_is_set_is_shown_whatever_the_kind():
  assert own_fields(preset('tiny', tied=True))['tied'] is True
  assert own_fields(preset('tiny', head='scalar', mtp_layers=0))['head'] == 'scalar'


@pytest.mark.parametrize('changes, words', [
  (dict(attention='mqa'), "attention 'mqa': use 'mla' or 'gqa'"),
  (dict(kv_heads=4), 'heads 6 do not divide over kv_heads 4: change one of them'),
  (dict(kv_heads=0), 'heads 6 do not divide over kv_heads 0'),
  (dict(head_dim=7), 'head_dim 7 must be even and positive'),
  (dict(kv_lora=16), "kv_lora 16 belongs to attention 'mla' and this is 'gqa': leave it out"),
  (dict(yarn=Yarn()), 'yarn and llama3 are two ways to scale positions: leave one out'),
  (dict(llama3=Llama3Rope(low_freq_factor=4.0)), 'llama3: low_freq_factor 4.0 must be under high_freq_factor 4.0'),
  (dict(dense_layers=1), 'experts 0, but 1 layers have experts: set it, or dense_layers = layers'),
  (dict(mtp_layers=1), 'experts 0, but 1 layers have experts: set it, or dense_layers = layers and mtp_layers = 0'),
])
def test_a_size_that_cannot_be_is_refused_by_its_name_with_the_remedy(changes, words):
  with pytest.raises(ValueError, match='^config.model: ' + re.escape(words)):
    dense(**changes)


@pytest.mark.parametrize('changes, words', [
  (dict(kv_lora=0), "kv_lora 0 must be positive with attention 'mla'"),
  (dict(qk_norm=True), "qk_norm True belongs to attention 'gqa' and this is 'mla': leave it out")])
def test_latent_attention_refuses_what_it_lacks_and_what_it_does_not_read(changes, words):
  with pytest.raises(ValueError, match='^config.model: ' + re.escape(words)):
    preset('tiny', **changes)


def test_useful_flops_are_twice_the_weights_of_the_products_and_attention():
  model, tokens, context = preset('qwen2_5_7b'), 10, 50
  norms_and_biases = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584
  products = parameter_count(model) - norms_and_biases - 152_064 * 3584  # the embedding is looked up
  attention = 28 * 2 * 3584 * context  # scores and values: 28 heads of 128 each
  assert forward_flops(model, tokens, context) == 2 * tokens * (products + attention)


# The attention.


def test_query_heads_read_their_own_key_and_value_head():
  """One layer against loops in float64: biases, norms before the turn, head h of 6 reads key head h // 3 of 2."""
  model, rng = dense(layers=1, dense_layers=1), np.random.default_rng(2)
  weights = jax.tree.map(lambda leaf: leaf[0], variables_of(model)['params']['dense']['attention'])
  x = rng.normal(size=(1, 9, 32)).astype(np.float32)
  got, cells = GQA(model).apply({'params': weights}, x, np.arange(9)[None], np.ones((1, 9), np.int32))
  w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)

  def heads(name, count, norm=True):
    y = (x[0].astype(np.float64) @ w[name] + w[f'{name}_bias']).reshape(9, count, 8)
    if norm:
      y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 0.01) * w[f'{name}_norm']['scale']
      angle = np.arange(9)[:, None, None] * np.asarray(frequencies(model), np.float64)
      pair = (y[..., :4] + 1j * y[..., 4:]) * np.exp(1j * angle)
      y = np.concatenate([pair.real, pair.imag], axis=-1)
    return y
  q, k, v = heads('q', 6), heads('k', 2), heads('v', 2, norm=False)
  out = np.zeros((9, 6, 8))
  for t in range(9):
    for h in range(6):
      score = np.exp(k[:t + 1, h // 3] @ q[t, h] / np.sqrt(8))
      out[t, h] = score @ v[:t + 1, h // 3] / score.sum()
  np.testing.assert_allclose(got[0], out.reshape(9, 48) @ w['out'], rtol=0, atol=2e-5)  # float32; entries of about 5
  np.testing.assert_allclose(cells[0], np.concatenate([k.reshape(9, 16), v.reshape(9, 16)], -1), rtol=0, atol=1e-5)


def test_matrices_start_from_the_configs_spread_and_biases_from_zero():
  x, positions = np.ones((1, 2, 32), np.float32), np.zeros((1, 2), np.int32)
  params = nn.unbox(GQA(dense()).init(jax.random.key(0), x, positions, method='cells'))['params']
  assert all(not params[name].any() for name in ('q_bias', 'k_bias', 'v_bias'))
  assert params['q'].std() == pytest.approx(0.3, rel=0.1)  # 1,536 draws: a standard error of 2%


def test_weight_decay_spares_biases_and_norms():
  config = ml_collections.ConfigDict(dict(optim=dict(
    lr=0.1, final_lr=0.1, warmup_steps=0, beta1=0.9, beta2=0.95, weight_decay=0.5, moment_dtype='float32',
    clip_norm=0.0)))
  params = {'attention': {'q': np.ones(2), 'q_bias': np.ones(2), 'q_norm': {'scale': np.ones(2)}}, 'embed': np.ones(2)}
  optimizer = make_optimizer(config, 10)
  updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
  moved = {jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if np.any(leaf)}
  assert moved == {"['attention']['q']", "['embed']"}


def test_llama3_slows_the_pairs_that_turn_rarely_over_the_original_context():
  model = preset('llama3_1_8b')
  scaled, plain = frequencies(model), frequencies(dataclasses.replace(model, llama3=None))
  turns = 8192 * plain / (2 * np.pi)
  np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
  np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
  between = (turns > 1) & (turns < 4)
  assert between.sum() == 6 and (np.diff(scaled) < 0).all()
  assert ((scaled > plain / 8) & (scaled < plain))[between].all()


# One model, two ways.


class Ways:
  """A batch of prompts with two completions each, as the trainer, the prefill and the decoder compute it."""

  def __init__(self):
    self.model, rng = dense(), np.random.default_rng(4)
    self.net, self.variables = Transformer(self.model), jax.tree.map(jnp.asarray, variables_of(self.model))
    self.prompts = rng.integers(1, 64, (3, PADDED)).astype(np.int32)
    self.completions = rng.integers(1, 64, (3, GROUP, NEW)).astype(np.int32)
    self.forward, self.step = jax.jit(self._forward), jax.jit(self._step)

  def _forward(self, ids, positions, segments):
    out = self.net.apply(self.variables, ids, positions, segments, with_cells=True)
    return self.net.apply(self.variables, out.hidden_NxTxD, method=self.net.logits), out.cells_LxNxTxZ

  def _step(self, ids_BxG, cache):
    hidden, cache = self.net.apply(self.variables, ids_BxG, cache, method=self.net.decode)
    return self.net.apply(self.variables, hidden, method=self.net.logits), cache

  def rows(self):
    """(ids [B G, P + S], lengths [B G]) as the trainer sees them."""
    ids = np.zeros((3 * GROUP, PADDED + NEW), np.int32)
    for n in range(3 * GROUP):
      b, g = divmod(n, GROUP)
      ids[n, :LENGTHS[b] + NEW] = [*self.prompts[b, :LENGTHS[b]], *self.completions[b, g]]
    return ids, np.repeat(LENGTHS, GROUP) + NEW

  def whole(self):
    """(logits [B, G, P + S, V], cells) of the rows."""
    ids, lengths = self.rows()
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    logits, cells = self.forward(ids, positions, (positions < lengths[:, None]).astype(np.int32))
    return np.asarray(logits).reshape(3, GROUP, PADDED + NEW, -1), cells


@pytest.fixture(scope='module')
def ways():
  return Ways()


def logp(logits):
  return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))


def test_decode_on_the_cache_equals_the_training_forward(ways):
  logits, cells = ways.whole()
  prompt_cells = cells[:, ::GROUP, :PADDED]  # a prompt's, with the first completion behind them masked off by length
  own = jnp.zeros((2, 3, GROUP, NEW, ways.model.latent_dim), cells.dtype)
  cache = LatentCache(prompt_cells, own, jnp.asarray(LENGTHS), jnp.zeros((), jnp.int32))
  for s in range(NEW):
    now, cache = ways.step(ways.completions[:, :, s], cache)
    for b, length in enumerate(LENGTHS):
      np.testing.assert_allclose(logp(now[b]), logp(logits[b, :, length + s]), rtol=0, atol=NATS)
  for b, length in enumerate(LENGTHS):
    for g in range(GROUP):
      np.testing.assert_allclose(cache.own_LxBxGxSxZ[:, b, g], cells[:, b * GROUP + g, length:length + NEW], atol=NATS)
  assert np.abs(logp(logits[1, 0]) - logp(logits[1, 1]))[LENGTHS[1]:].max() > 0.5  # completions differ to the model


def test_packed_sequences_do_not_see_each_other(ways):
  ids, _ = ways.rows()
  packed = np.zeros_like(ids)
  packed[0] = [*ids[0, :8], *ids[2, :10]]
  segments, positions = np.zeros_like(ids), np.zeros_like(ids)
  segments[0], positions[0] = [1] * 8 + [2] * 10, [*range(8), *range(10)]
  got = np.asarray(ways.forward(packed, positions, segments)[0][0])
  alone = ways.whole()[0].reshape(3 * GROUP, PADDED + NEW, -1)
  np.testing.assert_allclose(got[:8], alone[0, :8], rtol=0, atol=2e-5)  # logits of about 10
  np.testing.assert_allclose(got[8:], alone[2, :10], rtol=0, atol=2e-5)
