"""The Transformer whole: its sizes, what a logit may depend on, rematerialisation, precision, initial weights."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rl.models import moe
from moe_rl.models.config import preset
from moe_rl.models.transformer import Transformer, init, parameter_count

MINIATURE = dict(vocab_size=64, width=32, dense_ff=48, heads=2, kv_lora=16, nope_dim=8, rope_dim=4, v_dim=8,
                 expert_ff=16, layers=3, groups=4, kept_groups=2)
# Packed row of three segments and padding: (segment, start, length).
SEGMENTS = ((1, 0, 5), (2, 5, 8), (3, 13, 4))
ROW = 20


# float32 rounding through three layers is a few 1e-7 of logits of size 1 to 10; sums over keys and experts may be
# taken in another order when other tokens share the batch. A real dependence would show as 1e-2 or more.
REORDERED = dict(rtol=0, atol=1e-5)


def miniature(**changes):
  return preset('tiny', **{**MINIATURE, **changes})


def random_variables(config, seed: int) -> dict:
  """Weights large enough that every part matters, norms' scales around 1, selection biases of both signs."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    centre, spread = (1.0, 0.3) if 'scale' in name else (0.0, 0.3 if 'bias' in name else 0.2)
    return jnp.asarray(rng.normal(centre, spread, leaf.shape), leaf.dtype)
  shapes = nn.unbox(jax.eval_shape(lambda key: init(config, key), jax.random.key(0)))
  return jax.tree_util.tree_map_with_path(fill, shapes)


def packed_row():
  """(positions [T], segments [T]) of `SEGMENTS`."""
  positions, segments = np.zeros(ROW, np.int32), np.zeros(ROW, np.int32)
  for segment, start, length in SEGMENTS:
    positions[start:start + length] = np.arange(length)
    segments[start:start + length] = segment
  return positions, segments


class Probe:
  """One miniature model and its compiled functions, shared by the tests of what depends on what."""

  def __init__(self):
    self.config = miniature()
    self.net = Transformer(self.config)
    self.variables = random_variables(self.config, seed=1)
    positions, segments = packed_row()
    self.positions, self.segments = np.stack([positions] * 3), np.stack([segments] * 3)
    # Every position has an id of its own, so that a row of the embedding's gradient is a position's gradient; id 0,
    # which pads the shift of multi-token prediction, is no position's.
    self.ids = np.random.default_rng(2).permutation(np.arange(1, 3 * ROW + 1)).reshape(3, ROW).astype(np.int32)
    self.forward = jax.jit(self.logits_and_stats)
    self.pull = jax.jit(self.pullback)
    self.second_hidden = jax.jit(lambda variables, hidden, ids: self.net.apply(
      variables, hidden, ids, self.positions, self.segments, method=self.net.second_hidden))

  def outputs(self, variables, ids, positions, segments):
    """(logits, second logits, router stats)."""
    out = self.net.apply(variables, ids, positions, segments)
    second = self.net.apply(variables, out.hidden_NxTxD, ids, positions, segments, method=self.net.second_hidden)
    return (self.net.apply(variables, out.hidden_NxTxD, method=self.net.logits),
            self.net.apply(variables, second, method=self.net.second_logits), out.router)

  def logits_and_stats(self, ids, positions, segments):
    return self.outputs(self.variables, ids, positions, segments)

  def pullback(self, cotangent, second_cotangent):
    """Gradient [3, T, D] of the weighted logits by each position's embedding, and that by the selection biases."""
    def f(embed, router):
      variables = {'params': {**self.variables['params'], 'embed': embed}, 'router': router}
      return self.outputs(variables, self.ids, self.positions, self.segments)[:2]
    _, vjp = jax.vjp(f, self.variables['params']['embed'], self.variables['router'])
    embed, router = vjp((cotangent, second_cotangent))
    return embed[self.ids], router

  def gradient_of(self, t: int, second: bool):
    """[3, T, D]: how the (second) logits of row 0 at t hang on each position's embedding."""
    cotangent = np.zeros((3, ROW, self.config.vocab_size), np.float32)
    rows = cotangent.copy()
    rows[0, t] = np.random.default_rng(t).normal(size=self.config.vocab_size)
    return np.array(self.pull(cotangent if second else rows, rows if second else cotangent)[0])


@pytest.fixture(scope='module')
def probe():
  return Probe()


@pytest.mark.parametrize('name, count', [
    ('tiny', 1_029_200),  # ours: a change of size has to be meant
    ('small', 103_998_640),
    ('v2_lite_16b', 15_706_484_224),  # these three: as counted in the released files
    ('moonlight_16b', 15_960_110_208),
    ('v3_671b', 671_026_419_200),
])
def test_a_preset_has_exactly_the_parameters_of_the_released_model(name, count):
  assert parameter_count(preset(name)) == count


def test_the_prediction_module_of_v3_is_one_expert_layer_a_projection_and_its_norms():
  own = parameter_count(preset('v3_671b'), mtp=True) - parameter_count(preset('v3_671b'))
  mla = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168 + 1536 + 512
  feed_forward = 7168 * 256 + 256 + 257 * 3 * 7168 * 2048  # router and its bias, 256 + 1 experts
  projection_and_norms = 2 * 7168 * 7168 + 5 * 7168  # norms: two of the block, three of the module
  assert own == mla + feed_forward + projection_and_norms == 11_610_068_224


@pytest.mark.parametrize('changes, words', [
    (dict(top_k=9, groups=1, kept_groups=1), 'top_k 9 needs 1..8 experts'),
    (dict(top_k=5), 'top_k 5 needs 1..4 experts in the kept groups: lower top_k or keep more groups'),
    (dict(top_k=0), 'top_k 0 needs 1..4'),
    (dict(groups=3), 'experts 8 do not divide into 3 groups: change experts or groups'),
    (dict(kept_groups=5), 'kept_groups 5 not in 1..4'),
    (dict(kept_groups=0), 'kept_groups 0 not in 1..4'),
    (dict(rope_dim=5), 'rope_dim 5 must be even'),
    (dict(dense_layers=4), 'dense_layers 4 not in 0..3'),
    (dict(score='tanh'), "score 'tanh': use 'sigmoid' or 'softmax'"),
    (dict(remat='some'), "remat 'some': use one of none, dots, halves, full"),
    (dict(expert_path='fast'), "expert_path 'fast': use 'auto', 'ragged', 'rounds' or 'dense'"),
    (dict(mtp_layers=2), 'mtp_layers 2: only 0 and 1 exist'),
])
def test_a_size_that_cannot_be_is_refused_by_its_name_with_the_remedy(changes, words):
  with pytest.raises(ValueError, match='^config.model: ' + re.escape(words)):
    miniature(**changes)


def test_an_unknown_preset_is_refused_with_the_known_ones():
  known = 'tiny, tiny_dense, small, v2_lite_16b, moonlight_16b, v3_671b'
  with pytest.raises(ValueError, match=f"no preset 'v4': use one of {known}"):
    preset('v4')


def test_initial_weights_have_the_papers_spread_and_norms_start_at_one():
  config = miniature(init_std=0.006, q_lora=24, layers=1, dense_layers=0)
  variables = jax.jit(lambda: nn.unbox(init(config, jax.random.key(0))))()
  flat = {jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
          for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
  assert len(flat) > 20
  for name, leaf in flat.items():
    if 'scale' in name:
      np.testing.assert_array_equal(leaf, 1, name)
    elif 'bias' in name:
      np.testing.assert_array_equal(leaf, 0, name)
    else:  # the standard error of a sample's deviation is std / sqrt(2 n), of its mean std / sqrt(n)
      assert abs(leaf.std() - 0.006) < 3 * 0.006 / np.sqrt(2 * leaf.size), name
      assert abs(leaf.mean()) < 3 * 0.006 / np.sqrt(leaf.size), name


def test_deepseeks_presets_start_from_the_papers_spread():
  assert {preset(name).init_std for name in ('v2_lite_16b', 'moonlight_16b', 'v3_671b')} == {0.006}


def test_a_packed_row_gives_the_logits_of_each_sample_alone(probe):
  rows = [(np.zeros(ROW, np.int32), np.zeros(ROW, np.int32), np.zeros(ROW, np.int32)) for _ in SEGMENTS]
  for (ids, positions, segments), (_, start, length) in zip(rows, SEGMENTS, strict=True):
    ids[:length], positions[:length], segments[:length] = probe.ids[0, start:start + length], np.arange(length), 1
  alone = [np.stack(parts) for parts in zip(*rows, strict=True)]
  packed = [np.broadcast_to(x[:1], (len(SEGMENTS), ROW)) for x in (probe.ids, probe.positions, probe.segments)]
  logits, second_logits, _ = probe.forward(*packed)
  logits_alone, second_alone, _ = probe.forward(*alone)
  for n, (_, start, length) in enumerate(SEGMENTS):
    np.testing.assert_allclose(logits[n, start:start + length], logits_alone[n, :length], **REORDERED)
    length -= 1  # a segment's last token has no next one, so its second logits foretell nothing
    np.testing.assert_allclose(second_logits[n, start:start + length], second_alone[n, :length], **REORDERED)


@pytest.mark.parametrize('t', [3, 5, 12])  # inside the first segment; first and last token of the second
def test_a_logit_hangs_on_no_later_token_and_no_other_segment(probe, t):
  gradient = probe.gradient_of(t, second=False)
  _, start, _ = SEGMENTS[probe.segments[0, t] - 1]
  seen = np.abs(gradient[0, start:t + 1]).max(-1)
  assert (seen > 1e-3).all(), seen  # it hangs on each token of its own past ...
  gradient[0, start:t + 1] = 0
  assert not gradient.any()  # ... and, exactly, on nothing else in the row or in another row


@pytest.mark.parametrize('t', [3, 8, 11])
def test_a_second_logit_hangs_on_the_tokens_up_to_the_next_one(probe, t):
  gradient = probe.gradient_of(t, second=True)
  _, start, _ = SEGMENTS[probe.segments[0, t] - 1]
  seen = np.abs(gradient[0, start:t + 2]).max(-1)
  assert (seen > 1e-3).all(), seen
  gradient[0, start:t + 2] = 0
  assert not gradient.any()


def test_changing_later_tokens_never_changes_an_earlier_logit(probe):
  """What gradients do not see: a choice of experts that leaks through the order of dispatch."""
  before, _, _ = probe.forward(probe.ids, probe.positions, probe.segments)
  changed = probe.ids.copy()
  changed[0, 9:] = (changed[0, 9:] + 7) % 64
  after, _, _ = probe.forward(changed, probe.positions, probe.segments)
  np.testing.assert_allclose(after[0, :9], before[0, :9], **REORDERED)
  np.testing.assert_allclose(after[1:], before[1:], **REORDERED)
  assert np.abs(after[0, 9:13] - before[0, 9:13]).max() > 0.1


def test_padding_influences_nothing(probe):
  before, second_before, stats_before = probe.forward(probe.ids, probe.positions, probe.segments)
  noise = np.random.default_rng(3)
  real = probe.segments > 0
  ids = np.where(real, probe.ids, noise.integers(0, 64, probe.ids.shape)).astype(np.int32)
  positions = np.where(real, probe.positions, noise.integers(0, 99, probe.ids.shape)).astype(np.int32)
  after, second_after, stats_after = probe.forward(ids, positions, probe.segments)
  np.testing.assert_array_equal(after[real], before[real])
  inner = real & np.roll(real, -1, axis=1)  # the last real position's second logits read the token after it
  np.testing.assert_array_equal(second_after[inner], second_before[inner])
  jax.tree.map(np.testing.assert_array_equal, stats_after, stats_before)
  assert stats_after.load_E.sum(-1).tolist() == [probe.config.top_k * real.sum()] * probe.config.moe_layers


def test_no_gradient_reaches_the_selection_bias(probe):
  ones = np.ones((3, ROW, probe.config.vocab_size), np.float32)
  for leaf in jax.tree.leaves(probe.pull(ones, ones)[1]):
    assert leaf.shape[-1] == probe.config.experts and not leaf.any()


@pytest.mark.parametrize('half, reads', [('embedding', 'ids'), ('hidden', 'hidden')])
def test_the_prediction_modules_projection_takes_the_embedding_first(probe, half, reads):
  """With the other half of the projection zeroed, the module reads that half's input alone."""
  width = probe.config.width
  keep = slice(0, width) if half == 'embedding' else slice(width, None)
  module = probe.variables['params']['mtp']
  project = jnp.zeros_like(module['project']).at[keep].set(module['project'][keep])
  variables = {**probe.variables, 'params': {**probe.variables['params'], 'mtp': {**module, 'project': project}}}
  hidden = np.random.default_rng(4).normal(size=(2, 3, ROW, width)).astype(np.float32)
  base = probe.second_hidden(variables, hidden[0], probe.ids)

  def moved(hidden, ids):
    return np.abs(probe.second_hidden(variables, hidden, ids) - base).max()
  assert (moved(hidden[1], probe.ids) > 0.1) == (reads == 'hidden')
  assert (moved(hidden[0], probe.ids[::-1]) > 0.1) == (reads == 'ids')


def remat_program(remat: str):
  config = miniature(remat=remat, layers=4, dense_layers=0, mtp_layers=0)
  net, variables = Transformer(config), random_variables(config, seed=5)
  ids = np.random.default_rng(6).integers(0, 64, (4, 64)).astype(np.int32)
  positions = np.broadcast_to(np.arange(64, dtype=np.int32), ids.shape)

  def loss(params):
    out = net.apply({**variables, 'params': params}, ids, positions, np.ones_like(ids))
    logp = jax.nn.log_softmax(net.apply({**variables, 'params': params}, out.hidden_NxTxD, method=net.logits))
    return -jnp.take_along_axis(logp[:, :-1], ids[:, 1:, None], -1).mean() + 0.1 * out.router.balance.mean()
  compiled = jax.jit(jax.value_and_grad(loss)).lower(variables['params']).compile()
  return compiled(variables['params']), compiled.memory_analysis().temp_size_in_bytes


def test_rematerialisation_changes_memory_and_no_number():
  results = {remat: remat_program(remat) for remat in ('none', 'dots', 'halves', 'full')}
  (loss, gradient), memory = results['none']
  for remat in ('dots', 'halves', 'full'):
    (other_loss, other_gradient), _ = results[remat]
    # Recomputed products round as the first ones do, but XLA fuses them with other neighbours: 1e-5 of each array's
    # largest entry is some hundred roundings.
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
                 other_gradient, gradient)
  assert results['full'][1] < results['dots'][1] < memory


def test_bfloat16_compute_keeps_router_scores_in_float32():
  """Two experts whose scores differ by 2e-5: one bfloat16 number (8 bits), but not one float32 number."""
  config = miniature(experts=4, groups=1, kept_groups=1, top_k=1, shared_experts=0, compute_dtype='bfloat16')
  layer, rng = moe.MoE(config), np.random.default_rng(7)
  x = jnp.asarray(rng.uniform(0.5, 1, (2, 24, config.width)), jnp.bfloat16)
  variables = nn.unbox(jax.eval_shape(lambda: layer.init(jax.random.key(0), x, jnp.ones((2, 24), bool))))
  variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), variables)
  router = np.full((config.width, 4), -0.1, np.float32)
  router[:, 0], router[:, 1] = 1 / config.width, (1 + 1e-4) / config.width
  variables = {'params': {**variables['params'], 'router': router}, 'router': {'bias': np.zeros(4, np.float32)}}
  y, stats = jax.jit(layer.apply)(variables, x, np.ones((2, 24), bool))
  assert y.dtype == jnp.bfloat16 and stats.load_E.dtype == stats.balance.dtype == jnp.float32
  assert stats.load_E.tolist() == [0, 48, 0, 0]
  score = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ router))
  expected = 4 * (score / score.sum(-1, keepdims=True))[..., 1].mean()
  np.testing.assert_allclose(stats.balance, expected, rtol=1e-6)  # float32; bfloat16 scores would be off by 1e-3


def test_bfloat16_compute_gives_float32_logits_near_those_of_float32(probe):
  config = miniature(compute_dtype='bfloat16')
  net = Transformer(config)

  @jax.jit
  def forward(variables, *rows):
    hidden = net.apply(variables, *rows).hidden_NxTxD
    return hidden, net.apply(variables, hidden, method=net.logits)
  hidden, logits = forward(probe.variables, probe.ids, probe.positions, probe.segments)
  exact, _, _ = probe.forward(probe.ids, probe.positions, probe.segments)
  assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  # 8 bits of mantissa: 2^-9 a rounding, some tens of them on the way; a token whose choice of experts turns with it
  # moves further, hence the median.
  assert np.median(np.abs(logits - exact)) < 0.03 * np.abs(exact).std()
