"""One response, token by token: prefill in a bucket of lengths, then one jitted step a token, by the sampler's own
model code and draws. For people who wait; rollouts are sampled all at once (`sampler`)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_rl.models.attention import LatentCache
from moe_rl.models.heads import distribution
from moe_rl.models.transformer import Transformer
from moe_rl.rl.sampler import draw, noise_at, row_keys

SHORTEST = 64  # tokens of the narrowest prefill; wider ones double


class Stream:
  """Responses to prompts of any length, of up to `room` tokens each.

  temperature 0 takes the likeliest token. Randomness is addressed as the sampler's: (key, problem, sample 0, position).
  Programs are compiled once for each bucket of prompt lengths.
  """

  def __init__(self, net: Transformer, variables: dict, *, room: int, temperature: float = 1.0, top_p: float = 1.0):
    self.net, self.variables, self.room = net, variables, room
    self.temperature, self.top_p = temperature, top_p
    self._prefill = jax.jit(self._prefill_of)
    self._step = jax.jit(self._step_of, donate_argnums=1)

  def bucket(self, tokens: int) -> int:
    width = SHORTEST
    while width < tokens:
      width *= 2
    return width

  def _prefill_of(self, variables, prompt_1xP, length_1, key):
    width, config = prompt_1xP.shape[1], self.net.config
    positions = jnp.arange(width, dtype=jnp.int32)[None]
    out = self.net.apply(variables, prompt_1xP, positions, (positions < length_1).astype(jnp.int32), with_cells=True)
    last = jnp.take_along_axis(out.hidden_NxTxD, (length_1 - 1)[:, None, None], axis=1)
    own = jnp.zeros((config.layers, 1, 1, self.room, config.latent_dim), out.cells_LxNxTxZ.dtype)
    cache = LatentCache(out.cells_LxNxTxZ, own, length_1, jnp.zeros((), jnp.int32))
    return self._drawn(variables, last, key, 0), cache

  def _step_of(self, variables, cache: LatentCache, token, key):
    hidden, cache = self.net.apply(variables, token[None, None], cache, method=self.net.decode)
    return self._drawn(variables, hidden, key, cache.own_length), cache

  def _drawn(self, variables, hidden_1x1xD, keys_1x1, position) -> jax.Array:
    logits = self.net.apply(variables, hidden_1x1xD, method=self.net.logits)
    if not self.temperature:
      return jnp.argmax(logits[0, 0]).astype(jnp.int32)
    token, _ = draw(noise_at(keys_1x1, position), distribution(logits, self.temperature, 0, self.top_p))
    return token[0, 0]

  def start(self, prompt: Sequence[int], key: jax.Array, problem: int = 0) -> 'Response':
    """Reads the prompt; the response is then drawn from what this returns. Raises ValueError for an empty prompt."""
    if not len(prompt):
      raise ValueError('a prompt needs at least one token')
    ids = np.zeros((1, self.bucket(len(prompt))), np.int32)
    ids[0, :len(prompt)] = prompt
    keys = row_keys(key, jnp.array([problem], jnp.int32), 1)
    token, cache = self._prefill(self.variables, ids, np.array([len(prompt)], np.int32), keys)
    return Response(functools.partial(self._step, self.variables), token, cache, keys, self.room)


class Response:
  """A response under way. `proposed` is the token that the model draws next; `take` makes it, or any other, the next
  one. tokens: taken so far."""

  def __init__(self, step, token, cache, keys, room: int):
    self._step, self._token, self._cache, self._keys, self._room = step, token, cache, keys, room
    self.tokens: list[int] = []

  @property
  def proposed(self) -> int:
    return int(self._token)

  @property
  def full(self) -> bool:
    return len(self.tokens) >= self._room

  def take(self, token: int):
    """Raises ValueError once there is no room."""
    if self.full:
      raise ValueError(f'the response has its {self._room} tokens: ask for more room')
    self.tokens.append(token)
    if not self.full:
      self._token, self._cache = self._step(self._cache, np.int32(token), self._keys)
