"""GRPO, pure: advantages, the clipped policy loss, the KL estimate, and what each mean is over.

DeepSeekMath (arXiv:2402.03300) sec. 4.1; DeepSeek-R1 (arXiv:2501.12948) eq. 1 to 3. Functions take one array of any
shape and return per-token values; every mean is taken once, by `token_weights`.
"""

import jax
import jax.numpy as jnp
import numpy as np

LOG_RATIO_LIMIT = 20.0  # nats; exp(20) = 4.9e8 is far outside any clip and far inside float32


def group_advantage(reward_BxG: np.ndarray, *, scale_by_std: bool = True, eps: float = 1e-6) -> np.ndarray:
  """Reward relative to the other answers to the same prompt: float32 [B, G], mean over G is 0 to rounding.

  reward_BxG: float32, any unit, G >= 2. The standard deviation is the population's (divides by G; the papers do not
  say). scale_by_std=False is Dr. GRPO (arXiv:2503.20783). A tied group gives exact zeros, so its prompt moves nothing.
  Raises ValueError if G < 2.
  """
  reward = np.asarray(reward_BxG, np.float32)
  if reward.ndim != 2 or reward.shape[1] < 2:
    raise ValueError(f'a group needs >= 2 answers, got shape {reward.shape}')
  centred = reward - reward.mean(1, keepdims=True)
  centred = np.where(tied_groups(reward)[:, None], np.float32(0), centred)  # a float32 mean of eight 0.7s is not 0.7
  return centred / (reward.std(1, keepdims=True) + np.float32(eps)) if scale_by_std else centred


def tied_groups(reward_BxG: np.ndarray) -> np.ndarray:
  """bool [B]: all answers of the group have the same reward."""
  reward = np.asarray(reward_BxG, np.float32)
  return reward.max(1) == reward.min(1)


def token_weights(length_N: np.ndarray, denominator: str, max_new: int) -> np.ndarray:
  """float32 [N]: the weight of each token of sample n, so that a weighted sum over all tokens is the named mean.

  'sequence': mean over samples of the mean over their tokens (GRPO); 'token': mean over all tokens (DAPO);
  'constant': sum over tokens / (samples * max_new) (Dr. GRPO). The samples are those of one optimizer step, over all
  microbatches and hosts; so accumulation and mesh change nothing. Raises ValueError for another name.
  """
  length = np.asarray(length_N, np.float64)
  if denominator == 'sequence':
    weight = 1 / (length.size * np.maximum(length, 1))
  elif denominator == 'token':
    weight = np.full(length.shape, 1 / max(length.sum(), 1))
  elif denominator == 'constant':
    weight = np.full(length.shape, 1 / (length.size * max_new))
  else:
    raise ValueError(f"loss_denominator '{denominator}': use 'sequence', 'token' or 'constant'")
  return weight.astype(np.float32)


def log_ratio(logp: jax.Array, old_logp: jax.Array) -> jax.Array:
  """log(pi / pi_old) in nats, clamped so that no exp overflows; the clamp passes no gradient."""
  return jnp.clip(logp - old_logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_loss(logp, old_logp, advantage, clip_low: float, clip_high: float) -> jax.Array:
  """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token, r = pi / pi_old.

  logp, old_logp: float32, nats; old_logp and advantage carry no gradient.
  """
  ratio = jnp.exp(log_ratio(logp, jax.lax.stop_gradient(old_logp)))
  advantage = jax.lax.stop_gradient(advantage)
  return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage)


def clipped(logp, old_logp, advantage, clip_low: float, clip_high: float) -> jax.Array:
  """bool: tokens whose gradient the clip takes away."""
  ratio = jnp.exp(log_ratio(logp, old_logp))
  return ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))


def kl_k3(logp: jax.Array, reference_logp: jax.Array) -> jax.Array:
  """pi_ref / pi - log(pi_ref / pi) - 1 per token: nats, >= 0, 0 at equality (DeepSeekMath eq. 4)."""
  d = log_ratio(jax.lax.stop_gradient(reference_logp), logp)
  return jnp.expm1(d) - d
