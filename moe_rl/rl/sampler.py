"""Sampling: one prefill a prompt, then absorbed decode of all its completions together, in one jitted program."""

import math

import flax
import jax
import jax.numpy as jnp

from moe_rl.models.attention import LatentCache
from moe_rl.models.heads import distribution
from moe_rl.models.layers import place
from moe_rl.models.transformer import Transformer, one_by_one
from moe_rl.runtime.programs import DECODING

FIRST_ROOM = 1 / 2  # of a completion's cells, which are read whole at every step, at first: one more loop to compile
FEW_ROWS = 3 / 8  # of all, that go on among themselves: one more loop to compile, 2 s on two CPU cores


@flax.struct.dataclass
class Rollout:
  """What was sampled, by token id. Text is for rewards and people only.

  prompt_BxP: int32, right-padded; prompt_length_B: int32; response_BxGxS: int32, 0 after the end, the end-of-text id
  included; logp_BxGxS: float32, nats, log-prob of each id under the (tempered, truncated, renormalised) distribution
  that it was drawn from, 0 after the end; length_BxG: int32, tokens of the response; stopped_BxG: bool, it ended by
  itself (False: cut at S tokens); problem_B: int32, the ids that addressed the randomness.

  prompt_picks_BxPxLxK, picks_BxGxSxLxK: int16, the experts that the prompt's and the response's tokens were sent to, by
  MoE layer, -1 for tokens that the sampler never read: those after the end, and the last one, which nothing follows.
  None unless asked for: they take 2 B a token, MoE layer and pick, 928 B a token at V3's sizes (58 layers, 8 picks),
  which is 30 MB for an answer of 32,768 tokens, as much again in the packed batch.
  """

  prompt_BxP: jax.Array
  prompt_length_B: jax.Array
  response_BxGxS: jax.Array
  logp_BxGxS: jax.Array
  length_BxG: jax.Array
  stopped_BxG: jax.Array
  problem_B: jax.Array
  prompt_picks_BxPxLxK: jax.Array | None = None
  picks_BxGxSxLxK: jax.Array | None = None


def row_keys(key: jax.Array, problem_B: jax.Array, group: int) -> jax.Array:
  """Keys [B, G] by (problem id, sample id), whatever the row a problem sits in."""
  def one(problem, sample):
    return jax.random.fold_in(jax.random.fold_in(key, problem), sample)
  return jax.vmap(lambda p: jax.vmap(lambda g: one(p, g))(jnp.arange(group)))(problem_B)


def noise_at(key_BxG: jax.Array, position) -> jax.Array:
  """Uniform numbers in [0, 1), float32 [B, G], addressed by row and position."""
  return jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, position))))(key_BxG)


def noise(key_BxG: jax.Array, places: int) -> jax.Array:
  """`noise_at` of so many positions, float32 [B, G, S]."""
  return jax.vmap(lambda position: noise_at(key_BxG, position), out_axes=-1)(jnp.arange(places))


def draw(uniform_BxG, logp_BxGxV) -> tuple[jax.Array, jax.Array]:
  """(token int32 [B, G], its log-prob): inverse CDF of a uniform number, by blocks of tokens and then within one, as
  sums of a whole vocabulary's length are slow."""
  vocabulary = logp_BxGxV.shape[-1]
  width = 1 << vocabulary.bit_length() // 2
  padded = jnp.pad(jnp.exp(logp_BxGxV), ((0, 0), (0, 0), (0, -vocabulary % width)))
  p = padded.reshape(*uniform_BxG.shape, -1, width)
  block, rest = _first_above(uniform_BxG, p.sum(-1))
  within, _ = _first_above(rest, jnp.take_along_axis(p, block[..., None, None], axis=-2)[..., 0, :])
  token = block * width + within
  return token, jnp.take_along_axis(logp_BxGxV, token[..., None], axis=-1)[..., 0]


def _first_above(u, p) -> tuple[jax.Array, jax.Array]:
  """(the first entry of p [..., n] up to which its sum exceeds the part u of the whole; how far u is into that entry,
  below 1)."""
  cdf = jnp.where(p > 0, jnp.cumsum(p, axis=-1), 0.0)  # a sum in parallel steps up by rounding even where p is 0
  wanted = u * cdf.max(-1)
  first = jnp.argmax(cdf > wanted[..., None], axis=-1).astype(jnp.int32)
  end, own = (jnp.take_along_axis(x, first[..., None], axis=-1)[..., 0] for x in (cdf, p))
  return first, jnp.clip(1 - (end - wanted) / own, 0.0, 1 - jnp.finfo(jnp.float32).eps)


@flax.struct.dataclass
class Rows:
  """Completions under way, [B, G, …] each; uniform: `noise`; response, logps and picks as `Rollout` has them."""

  uniform: jax.Array
  token: jax.Array
  stopped: jax.Array
  response: jax.Array
  logps: jax.Array
  picks: jax.Array | None


@flax.struct.dataclass
class Decoding:
  """What the decode loop carries; t: int32, the position of the next token."""

  t: jax.Array
  rows: Rows
  cache: LatentCache


def narrowed(state: Decoding, which_M: jax.Array) -> Decoding:
  """Some rows, numbered over [B G], with a cache by layers: as many prompts with one completion each."""
  group, cache = state.rows.token.shape[1], state.cache

  def take(x):
    return x.reshape(-1, *x.shape[2:])[which_M][:, None]
  cache = cache.replace(prompt_LxBxPxZ=tuple(x[which_M // group] for x in cache.prompt_LxBxPxZ),
                        own_LxBxGxSxZ=tuple(map(take, cache.own_LxBxGxSxZ)),
                        prompt_length_B=cache.prompt_length_B[which_M // group])
  return Decoding(state.t, jax.tree.map(take, state.rows), cache)


def put_rows(rows: Rows, which_M: jax.Array, some: Rows) -> Rows:
  """The rows with those of `narrowed` put back."""
  def put(x, new):
    return x.reshape(-1, *x.shape[2:]).at[which_M].set(new[:, 0]).reshape(x.shape)
  return jax.tree.map(put, rows.replace(uniform=None), some.replace(uniform=None))


def few_of(rows: int, layout) -> int:
  """FEW_ROWS of so many, as a number that the mesh's devices divide; 0 where that is all."""
  over = layout.size(layout.rules['batch']) if layout else 1
  few = math.ceil(rows * FEW_ROWS / over) * over
  return few if few < rows else 0


def make_sampler(net: Transformer, *, group: int, max_new: int, eos_id: int | tuple[int, ...],
                 temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, record_picks: bool = False):
  """(variables, prompt_BxP, prompt_length_B, problem_B, key) -> Rollout, to be jitted. Shapes depend on B and P only.

  key: addressed by (run seed, purpose, step); the sampler folds in problem, sample and position. It stops when all
  rows have ended, each at the first eos_id, of which there may be several. On CPU, where a step costs what its rows and
  their cells cost, there are few cells at first and the last rows go on among themselves. record_picks: the rollout
  says which experts each token went to.
  """
  model = net.config

  def apply(variables, *args, **kwargs):
    """(output, picks [moe layers, B, tokens, K] or None)."""
    if not record_picks:
      return net.apply(variables, *args, **kwargs), None
    out, seen = net.apply(variables, *args, mutable=['picks'], **kwargs)
    return out, seen['picks']['moe']['ff']['experts']

  def sample(variables, prompt_BxP, prompt_length_B, problem_B, key) -> Rollout:
    batch, length = prompt_BxP.shape
    split = one_by_one(model, net.layout)
    room = math.ceil(max_new * FIRST_ROOM) if split else max_new
    uniform = noise(row_keys(key, problem_B, group), max_new)

    def ends(token):
      return jnp.isin(token, jnp.array(eos_id))

    def choose(uniform, hidden):
      logits = net.apply(variables, hidden, method=net.logits)
      logp = distribution(logits, temperature, top_k, top_p)
      return draw(uniform, jnp.broadcast_to(logp, (*uniform.shape, logp.shape[-1])))

    with jax.named_scope('prefill'):
      positions = jnp.broadcast_to(jnp.arange(length), prompt_BxP.shape)
      segments = (positions < prompt_length_B[:, None]).astype(jnp.int32)
      out, prompt_picks = apply(variables, prompt_BxP, positions, segments, with_cells=True)
      last = jnp.take_along_axis(out.hidden_NxTxD, (prompt_length_B - 1)[:, None, None], axis=1)
      own = place(net, jnp.zeros((model.layers, batch, group, room, model.latent_dim), out.cells_LxNxTxZ.dtype),
                  None, 'batch', 'places', None, None)
      cells = place(net, out.cells_LxNxTxZ, None, 'batch', None, None)  # whole on each device of a prompt's completions
      cache = LatentCache(cells, own, prompt_length_B, jnp.zeros((), jnp.int32))
      cache = cache.split() if split else cache
      token, logp = choose(uniform[..., 0], last)

    response = jnp.zeros((batch, group, max_new), jnp.int32).at[:, :, 0].set(token)
    logps = jnp.zeros((batch, group, max_new), jnp.float32).at[:, :, 0].set(logp)
    if record_picks:
      prompt_picks = jnp.moveaxis(prompt_picks, 0, 2)
    picks = jnp.full((batch, group, max_new, *prompt_picks.shape[2:]), -1, jnp.int16) if record_picks else None

    def step(state: Decoding) -> Decoding:
      t, rows = state.t, state.rows
      (hidden, cache), read = apply(variables, rows.token, state.cache, ~rows.stopped, method=net.decode)
      token, logp = choose(jax.lax.dynamic_index_in_dim(rows.uniform, t, axis=2, keepdims=False), hidden)
      token, logp = jnp.where(rows.stopped, 0, token), jnp.where(rows.stopped, 0.0, logp)
      response = jax.lax.dynamic_update_slice_in_dim(rows.response, token[..., None], t, axis=2)
      logps = jax.lax.dynamic_update_slice_in_dim(rows.logps, logp[..., None], t, axis=2)
      picks = rows.picks
      if record_picks:  # of the token before this one, which the model has just read
        picks = jax.lax.dynamic_update_slice_in_dim(picks, jnp.moveaxis(read, 0, 2)[:, :, None], t - 1, axis=2)
      return Decoding(t + 1, Rows(rows.uniform, token, rows.stopped | ends(token), response, logps, picks), cache)

    def decode(state: Decoding, until: int, places: int = max_new) -> Decoding:
      """Until no more than so many rows go on, or so many places are full."""
      def going_on(state):
        return (state.t < places) & ((~state.rows.stopped).sum() > until)
      return jax.lax.while_loop(going_on, step, state)

    with jax.named_scope(DECODING):
      state = Decoding(jnp.ones((), jnp.int32), Rows(uniform, token, ends(token), response, logps, picks), cache)
      few = few_of(batch * group, net.layout) if split else 0
      if room < max_new:
        state = decode(state, few, room)
        state = state.replace(cache=state.cache.with_room(max_new))
      state = decode(state, few)
      rows = state.rows
      if few:
        which = jnp.argsort(rows.stopped.reshape(-1), stable=True)[:few]  # those that go on come first
        rows = put_rows(rows, which, decode(narrowed(state, which), 0).rows)
    stopped, response, logps, picks = rows.stopped, rows.response, rows.logps, rows.picks
    ended = ends(response)
    length_BxG = jnp.where(stopped, jnp.argmax(ended, axis=-1) + 1, max_new).astype(jnp.int32)
    if record_picks:  # the last token is read only where another row goes on
      prompt_picks = jnp.where(segments[..., None, None] > 0, prompt_picks, -1)
      picks = jnp.where((jnp.arange(max_new) < length_BxG[..., None] - 1)[..., None, None], picks, -1)
    return Rollout(prompt_BxP, prompt_length_B, response, logps, length_BxG, stopped, problem_B, prompt_picks, picks)

  return sample
