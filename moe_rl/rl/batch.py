"""From rollouts to packed rows: several samples a row, isolated by segments, so that little of an update is padding."""

import dataclasses

import flax
import jax
import numpy as np

from moe_rl.data.packing import place
from moe_rl.rl.sampler import Rollout


@flax.struct.dataclass
class PackedBatch:
  """M microbatches of R rows of T tokens, [M, R, T] each. Values at t belong to the token at t as a prediction.

  ids, positions, segments: int32 as the model takes them, segment 0 is padding; weight: float32, the token's share in
  the step's mean, 0 on prompts and padding; advantage: float32; logp: float32, nats, the old log-prob: under the
  weights that sampled, as the sampler or the trainer computed it; picks: int16 [M, R, T, moe layers, K], experts that
  the sampler picked, -1 where the model picks anew, None where nothing is replayed; importance: float32, factor of the
  policy's loss for the gap between sampler and trainer, None for 1.
  """

  ids: jax.Array
  positions: jax.Array
  segments: jax.Array
  weight: jax.Array
  advantage: jax.Array
  logp: jax.Array
  picks: jax.Array | None = None
  importance: jax.Array | None = None


def one_a_group(rollout: Rollout) -> Rollout:
  """Every sample as a group of its own, the first of each prompt, then the second of each …; of numpy arrays.

  So a rollout cut into equal parts has samples of all prompts in each, and each host its own prompts'.
  """
  group = rollout.length_BxG.shape[1]

  def alone(name: str, x):
    if x is None:
      return None
    return x.swapaxes(0, 1).reshape(-1, 1, *x.shape[2:]) if 'BxG' in name else np.concatenate([x] * group)
  return Rollout(**{f.name: alone(f.name, getattr(rollout, f.name)) for f in dataclasses.fields(rollout)})


def pack(rollout: Rollout, advantage_BxG, weight_BxG, *, row_tokens: int, microbatch_rows: int):
  """(PackedBatch, microbatches in use): every sample whole, longest first, into the first row with room.

  rollout: of numpy arrays; weight_BxG: a token's weight by sample, 0 for samples that are left out of the batch. M is
  that of one sample a row, so shapes depend on B and G only; microbatches past those in use are empty.
  Raises ValueError if a sample is longer than a row.
  """
  batch, group = rollout.length_BxG.shape
  lengths = (rollout.prompt_length_B[:, None] + rollout.length_BxG).reshape(-1)
  if lengths.max() > row_tokens:
    raise ValueError(f'a sample of {lengths.max()} tokens does not fit a row of {row_tokens}: raise rl.row_tokens')
  kept = np.flatnonzero(np.reshape(weight_BxG, -1))
  row_of, start_of, rows = place(lengths[kept], row_tokens)
  microbatches = -(-batch * group // microbatch_rows)
  shape = (microbatches * microbatch_rows, row_tokens)
  out = {name: np.zeros(shape, np.int32) for name in ('ids', 'positions', 'segments')}
  out |= {name: np.zeros(shape, np.float32) for name in ('weight', 'advantage', 'logp')}
  if rollout.picks_BxGxSxLxK is not None:
    out['picks'] = np.full((*shape, *rollout.picks_BxGxSxLxK.shape[-2:]), -1, np.int16)
  segment = np.zeros(shape[0], np.int32)
  for n, row, start in zip(kept, row_of, start_of, strict=True):
    b, g = divmod(n, group)
    p, r = rollout.prompt_length_B[b], rollout.length_BxG[b, g]
    segment[row] += 1
    whole, answer = slice(start, start + p + r), slice(start + p, start + p + r)
    out['ids'][row, start:start + p] = rollout.prompt_BxP[b, :p]
    out['ids'][row, answer] = rollout.response_BxGxS[b, g, :r]
    out['positions'][row, whole] = np.arange(p + r)
    out['segments'][row, whole] = segment[row]
    out['weight'][row, answer] = weight_BxG[b, g]
    out['advantage'][row, answer] = advantage_BxG[b, g]
    out['logp'][row, answer] = rollout.logp_BxGxS[b, g, :r]
    if 'picks' in out:
      out['picks'][row, start:start + p] = rollout.prompt_picks_BxPxLxK[b, :p]
      out['picks'][row, answer] = rollout.picks_BxGxSxLxK[b, g, :r]
  packed = {k: v.reshape(microbatches, microbatch_rows, *v.shape[1:]) for k, v in out.items()}
  return PackedBatch(**packed), -(-rows // microbatch_rows)
