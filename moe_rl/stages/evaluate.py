"""Evaluation on held-out problems: pass@1 over several samples each, with its standard error."""

import dataclasses

import numpy as np

from moe_rl.rl.rewards.pool import count_verdicts


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """accuracy, format: float [problems, samples]; tokens: int, lengths; stopped: bool, not cut; verdicts: counts."""

  accuracy: np.ndarray
  format: np.ndarray
  tokens: np.ndarray
  stopped: np.ndarray
  verdicts: dict[str, int]

  def record(self) -> dict:
    """pass@1: mean over problems of the mean over samples; its standard error over problems (n - 1)."""
    by_problem = self.accuracy.mean(1)
    return {
      'pass@1': float(by_problem.mean()),
      'pass@1_se': float(by_problem.std(ddof=1) / np.sqrt(by_problem.size)) if by_problem.size > 1 else float('nan'),
      'mean_tokens': float(self.tokens.mean()), 'format': float(self.format.mean()),
      'truncated': float(1 - self.stopped.mean()), 'problems': int(self.accuracy.shape[0]),
      'samples': int(self.accuracy.shape[1]), 'verdicts': self.verdicts}

  def __str__(self) -> str:
    r = self.record()
    return (f'pass@1 {r["pass@1"]:.3f} ± {r["pass@1_se"]:.3f}, {r["mean_tokens"]:.1f} tokens, format {r["format"]:.3f} '
            f'({r["problems"]} problems x {r["samples"]} samples)')


def evaluate(sample, grade, prompts: list, batch_size: int) -> Evaluation:
  """sample: (prompts) -> (Rollout, texts); grade: (prompts, texts) -> grades; prompts: the held-out ones.

  The last batch is filled up by repeating prompts, so that one program serves all; the repeats are not counted.
  """
  parts = []
  for start in range(0, len(prompts), batch_size):
    batch = prompts[start:start + batch_size]
    filled = batch + [batch[0]] * (batch_size - len(batch))
    rollout, texts = sample(prompts=filled)
    n, shape = len(batch), (len(batch), rollout.length_BxG.shape[1])
    grades = grade(batch, texts[:n])
    accuracy, form = (np.array([getattr(g, k) for g in grades]).reshape(shape) for k in ('accuracy', 'format'))
    parts.append((accuracy, form, rollout.length_BxG[:n], rollout.stopped_BxG[:n], grades))
  *arrays, grades = zip(*parts, strict=True)
  return Evaluation(*(np.concatenate(a) for a in arrays), count_verdicts([g for part in grades for g in part]))
