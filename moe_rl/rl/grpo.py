"""GRPO and its family, pure: advantages, ratios and their clipping, KL estimates, importance weights, and what each
mean is over.

DeepSeekMath (arXiv:2402.03300) sec. 4.1; DeepSeek-R1 (arXiv:2501.12948) eq. 1 to 3. Which of them a name stands for is
in `objectives.py`. Losses take log-probs in nats in one array of any shape and return a value an entry; every mean is
taken once, by `token_weights`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_rl.rl.objectives import ADVANTAGES, Objective

LOG_RATIO_LIMIT = 20.0  # nats; exp(20) = 4.9e8 is far outside any clip and far inside float32

# Advantages.


def advantages(kind: str, reward_BxG: np.ndarray, length_BxG: np.ndarray) -> np.ndarray:
  """float32 [B, G]: what an answer's reward is worth beside the others' of the step, by name.

  'group_std': less the group's mean, over its standard deviation (GRPO); 'group_mean': less the mean only (Dr. GRPO,
  arXiv:2503.20783); 'leave_one_out': less the mean of the others (RLOO, arXiv:2402.14740); 'batch_std': whitened over
  the tokens of the whole step, without a group's baseline (REINFORCE++, arXiv:2501.03262: with discount 1 every token
  of an answer has the answer's return, so a long answer counts by its length); 'group_batch_std': less the group's
  mean, then whitened like that.
  length_BxG: int, tokens of each answer, 0 for answers left out of the loss; used by the last two alone. A tied group
  gives exact zeros under all but 'batch_std'. Raises ValueError for another name or G < 2.
  """
  if kind not in ADVANTAGES:
    raise ValueError(f"advantage '{kind}': use one of {', '.join(ADVANTAGES)}")
  if kind == 'batch_std':
    return whiten(np.asarray(reward_BxG, np.float32), length_BxG)
  centred = group_advantage(reward_BxG, scale_by_std=kind == 'group_std')
  if kind == 'leave_one_out':
    group = centred.shape[1]
    return centred * np.float32(group / (group - 1))  # R - (sum - R) / (G - 1) = G / (G - 1) (R - mean)
  return whiten(centred, length_BxG) if kind == 'group_batch_std' else centred


def group_advantage(reward_BxG: np.ndarray, *, scale_by_std: bool = True, eps: float = 1e-6) -> np.ndarray:
  """Reward relative to the other answers to the same prompt: float32 [B, G], mean over G is 0 to rounding.

  reward_BxG: float32, any unit, G >= 2. The standard deviation is the population's (divides by G; the papers do not
  say). scale_by_std=False is Dr. GRPO. A tied group gives exact zeros, so its prompt moves nothing.
  Raises ValueError if G < 2.
  """
  reward = np.asarray(reward_BxG, np.float32)
  if reward.ndim != 2 or reward.shape[1] < 2:
    raise ValueError(f'a group needs >= 2 answers, got shape {reward.shape}')
  centred = reward - reward.mean(1, keepdims=True)
  centred = np.where(tied_groups(reward)[:, None], np.float32(0), centred)  # a float32 mean of eight 0.7s is not 0.7
  return centred / (reward.std(1, keepdims=True) + np.float32(eps)) if scale_by_std else centred


def whiten(value_BxG: np.ndarray, count_BxG: np.ndarray, eps: float = 1e-6) -> np.ndarray:
  """float32 [B, G]: (value - mean) / (standard deviation + eps), each value counted count times.

  Where all are equal, exact zeros.
  """
  value, count = np.asarray(value_BxG, np.float64), np.asarray(count_BxG, np.float64)
  counted = value[count > 0]
  if not counted.size or counted.min() == counted.max():
    return np.zeros(value.shape, np.float32)
  centred = value - np.average(value, weights=count)
  return (centred / (np.sqrt(np.average(centred**2, weights=count)) + eps)).astype(np.float32)


def tied_groups(reward_BxG: np.ndarray) -> np.ndarray:
  """bool [B]: all answers of the group have the same reward."""
  reward = np.asarray(reward_BxG, np.float32)
  return reward.max(1) == reward.min(1)


def fill(tied_N: np.ndarray, wanted: int) -> np.ndarray:
  """int [wanted]: which of N sampled groups a step trains on, in the order they were sampled.

  Those that differ in reward come first; where they are too few, tied ones fill up, which have no advantage.
  Raises ValueError if N < wanted.
  """
  if len(tied_N) < wanted:
    raise ValueError(f'{len(tied_N)} groups cannot fill a step of {wanted}')
  return np.sort(np.argsort(tied_N, kind='stable')[:wanted])


# Means.


def token_weights(length_N: np.ndarray, denominator: str, max_new: int, kept_N: np.ndarray | None = None) -> np.ndarray:
  """float32 [N]: the weight of each token of sample n, so that a weighted sum over all tokens is the named mean.

  'sequence': mean over samples of the mean over their tokens (GRPO); 'token': mean over all tokens (DAPO);
  'constant': sum over tokens / (samples * max_new) (Dr. GRPO). The samples are those of one optimizer step, over all
  microbatches and hosts; so accumulation and mesh change nothing. kept_N: bool; the others weigh nothing and are in no
  denominator, as though they had not been sampled. Raises ValueError for another name.
  """
  length = np.asarray(length_N, np.float64)
  kept = np.ones(length.shape, bool) if kept_N is None else np.asarray(kept_N)
  samples = max(kept.sum(), 1)
  if denominator == 'sequence':
    weight = 1 / (samples * np.maximum(length, 1))
  elif denominator == 'token':
    weight = np.full(length.shape, 1 / max(length[kept].sum(), 1))
  elif denominator == 'constant':
    weight = np.full(length.shape, 1 / (samples * max_new))
  else:
    raise ValueError(f"loss_denominator '{denominator}': use 'sequence', 'token' or 'constant'")
  return np.where(kept, weight, 0).astype(np.float32)


def at_level(x_RxT: jax.Array, answer_RxT: jax.Array, segments_RxT: jax.Array, level: str) -> jax.Array:
  """float32 [R, T]: x at the level of the ratio; answer: bool, the tokens that were sampled; segments as in a batch.

  'token': x itself; 'sequence': its sum over the answer that a token is of, at each of its tokens; 'sequence_mean':
  the mean. With token weights of 'sequence', what is then summed over tokens counts once an answer.
  """
  if level == 'token':
    return x_RxT
  rows, length = x_RxT.shape
  of_RxT = segments_RxT + (length + 1) * jnp.arange(rows)[:, None]  # at most `length` segments a row, and padding

  def totals(values):  # in the order of the tokens, wherever they lie: packing changes no bit
    return jax.ops.segment_sum(values.reshape(-1), of_RxT.reshape(-1), rows * (length + 1))[of_RxT]
  total = totals(jnp.where(answer_RxT, x_RxT, 0.0))
  if level == 'sequence_mean':
    total = total / jnp.maximum(totals(answer_RxT.astype(jnp.float32)), 1)
  return jnp.where(answer_RxT, total, 0.0)


# The surrogate losses. Below the token's level they are given the summed or averaged log-ratio, and 0 as the old one.


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


def weight_loss(logp, old_logp, advantage, clip_low: float, clip_high: float) -> jax.Array:
  """-clip(r, 1 - clip_low, 1 + clip_high) A log pi, the clipped ratio held constant (CISPO, arXiv:2506.13585).

  The clip bounds what a token weighs and takes no token's gradient away.
  """
  ratio = jax.lax.stop_gradient(jnp.exp(log_ratio(logp, old_logp)))
  return -jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * jax.lax.stop_gradient(advantage) * logp


def clipped(logp, old_logp, advantage, clip_low: float, clip_high: float) -> jax.Array:
  """bool: tokens whose gradient the clip takes away."""
  ratio = jnp.exp(log_ratio(logp, old_logp))
  return ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))


def out_of_range(logp, old_logp, advantage, clip_low: float, clip_high: float) -> jax.Array:
  """bool: tokens with an advantage whose ratio `weight_loss` clips."""
  ratio = jnp.exp(log_ratio(logp, old_logp))
  return (advantage != 0) & ((ratio > 1 + clip_high) | (ratio < 1 - clip_low))


SURROGATE = {'clip': (policy_loss, clipped), 'weight': (weight_loss, out_of_range)}

# KL estimates of KL(pi || reference) from tokens that pi sampled (Schulman, 2020), nats.


def kl_k1(logp: jax.Array, reference_logp: jax.Array) -> jax.Array:
  """log(pi / pi_ref): unbiased, of either sign.

  Its plain derivative, the score, has mean zero and would penalise nothing. So the gradient is that of the expectation,
  k1 times the score, which is k2's: correct on tokens that pi sampled.
  """
  d = jax.lax.stop_gradient(logp - reference_logp)
  return d + d * (logp - jax.lax.stop_gradient(logp))


def kl_k2(logp: jax.Array, reference_logp: jax.Array) -> jax.Array:
  """log(pi / pi_ref)^2 / 2: >= 0, biased in value, with the correct gradient of KL(pi || pi_ref) on tokens that pi
  sampled."""
  return 0.5 * jnp.square(logp - jax.lax.stop_gradient(reference_logp))


def kl_k3(logp: jax.Array, reference_logp: jax.Array) -> jax.Array:
  """pi_ref / pi - log(pi_ref / pi) - 1 per token: nats, >= 0, 0 at equality (DeepSeekMath eq. 4).

  Unbiased in value; its gradient is, in the mean, that of KL(pi_ref || pi), which agrees with the other near equality
  only. GRPO is published with it.
  """
  d = log_ratio(jax.lax.stop_gradient(reference_logp), logp)
  return jnp.expm1(d) - d


KL = {'k1': kl_k1, 'k2': kl_k2, 'k3': kl_k3}

# Sampler and trainer.


def importance_weights(trainer_logp, sampler_logp, answer_RxT, segments_RxT, kind: str, low: float, high: float):
  """float32 [R, T]: what a token's policy loss is multiplied by, so that tokens which the sampler drew under slightly
  other probabilities count as though the trainer had. Carries no gradient.

  With w = pi_trainer / pi_sampler at the weights that sampled: 'truncate' min(w, high) (truncated importance
  sampling); 'mask' w inside low..high and 0 outside; 'mask_sequence' w, and 0 for all of an answer whose w, as its
  tokens' geometric mean, is outside. 'none' is 1. The mean's denominator keeps the masked.
  Raises ValueError for another name.
  """
  w = jnp.exp(log_ratio(trainer_logp, sampler_logp))
  if kind == 'none':
    w = jnp.ones_like(w)
  elif kind == 'truncate':
    w = jnp.minimum(w, high)
  elif kind in ('mask', 'mask_sequence'):
    level = 'token' if kind == 'mask' else 'sequence_mean'
    judged = jnp.exp(log_ratio(at_level(trainer_logp - sampler_logp, answer_RxT, segments_RxT, level), 0.0))
    w = jnp.where((judged >= low) & (judged <= high), w, 0.0)
  else:
    raise ValueError(f"importance '{kind}': use 'none', 'truncate', 'mask' or 'mask_sequence'")
  return jax.lax.stop_gradient(w)


# The whole.


def loss(o: Objective, logp, reference_logp, batch) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(sum over tokens of weight (importance policy + kl_weight KL), sums over tokens of 'clipped' and 'kl').

  logp, reference_logp: float32 [R, T], nats, reference None where o.kl_weight is 0; batch: a microbatch of
  `batch.PackedBatch`. KL is taken at the ratio's level only where that is a whole answer's, as R1 writes it.
  """
  answer = batch.weight > 0
  token, old = answer.astype(jnp.float32), jax.lax.stop_gradient(batch.logp)
  levelled, old = (logp, old) if o.ratio == 'token' else (at_level(logp - old, answer, batch.segments, o.ratio), 0.0)
  surrogate, is_clipped = SURROGATE[o.surrogate]
  policy = surrogate(levelled, old, batch.advantage, o.clip_low, o.clip_high)
  sums = {'clipped': (is_clipped(levelled, old, batch.advantage, o.clip_low, o.clip_high) * token).sum()}
  if batch.importance is not None:
    policy = policy * batch.importance
  total = (batch.weight * policy).sum()
  if reference_logp is not None:
    apart = (logp, reference_logp)
    if o.ratio == 'sequence':
      apart = (at_level(logp - jax.lax.stop_gradient(reference_logp), answer, batch.segments, o.ratio), 0.0)
    kl = KL[o.kl](*apart)
    total = total + o.kl_weight * (batch.weight * kl).sum()
    sums['kl'] = (kl * token).sum()
  return total, sums
