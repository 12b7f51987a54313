"""Rotary positions, with YaRN's or Llama 3.1's interpolation for contexts beyond the original one."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_rl.models.config import Llama3Rope, ModelConfig, Yarn, yarn_magnitude

TABLE = 1024  # positions at most that are looked up


def yarn_range(dim: int, theta: float, yarn: Yarn) -> tuple[int, int]:
  """First and last pair of the ramp: below `low` frequencies stay, from `high` on they are divided.

  d(r) = dim ln(original / (2 pi r)) / (2 ln theta) is the pair that turns r times over the original
  context. dim 64, theta 1e4, original 4096, 32/1 gives (10, 23), DeepSeek-V3's.
  """
  def pair(turns):
    return dim * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
  low, high = math.floor(pair(yarn.beta_fast)), math.ceil(pair(yarn.beta_slow))
  return max(low, 0), min(high, dim - 1)


def llama3_scaled(frequency: np.ndarray, rope: Llama3Rope) -> np.ndarray:
  """Frequencies (radians a token) for a context `rope.factor` times the original one (Llama 3.1's released code)."""
  turns = rope.original_length * frequency / (2 * math.pi)  # over the original context
  kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
  return frequency * (kept + (1 - kept) / rope.factor)


def frequencies(config: ModelConfig) -> np.ndarray:
  """float32 [R/2], radians a token; a numpy constant, so that it folds into the program."""
  dim = config.rotary_dim
  frequency = config.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
  if config.yarn is not None:
    low, high = yarn_range(dim, config.rope_theta, config.yarn)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    frequency = frequency / config.yarn.factor * ramp + frequency * (1 - ramp)
  if config.llama3 is not None:
    frequency = llama3_scaled(frequency, config.llama3)
  return frequency.astype(np.float32)


def cos_sin(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
  """cos and sin of position * frequency_i, times YaRN's magnitude: float32 [..., R/2] each.

  A model of few positions looks them up, and those beyond its max_length are NaN: XLA's fusions on CPU compute a cosine
  anew for every head and use.
  """
  magnitude = 1.0
  if config.yarn is not None:
    yarn = config.yarn
    magnitude = yarn_magnitude(yarn.factor, yarn.mscale) / yarn_magnitude(yarn.factor, yarn.mscale_all_dim)
  frequency = frequencies(config)
  if config.max_length > TABLE:
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude
  angle = (np.arange(config.max_length, dtype=np.float32)[:, None] * frequency).astype(np.float64)
  tables = (jnp.asarray(np.float32(f(angle) * magnitude)) for f in (np.cos, np.sin))
  return tuple(table.at[positions].get(mode='fill', fill_value=np.nan) for table in tables)


def rotate(x: jax.Array, positions: jax.Array, config: ModelConfig) -> jax.Array:
  """Turns pairs (i, i + R/2) of the last axis by position * frequency_i.

  x: [..., *heads, R] with positions' axes leading; positions: int32, tokens. Computed in float32 and
  returned in x's dtype. The half-split layout is the interleaved one of the released checkpoints with the
  weights' rows permuted, which changes no score as long as queries and keys are permuted alike.
  """
  cos, sin = (turn.reshape(positions.shape + (1,) * (x.ndim - positions.ndim - 1) + turn.shape[-1:])
              for turn in cos_sin(positions, config))
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)
