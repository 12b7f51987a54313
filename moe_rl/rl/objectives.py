"""The policy objectives by name, as data: `OBJECTIVES` says what a name stands for, `chosen` what a config comes to.

The rule: `config.rl.objective` names a row of the table; a key of config.rl that has the name of a field here is None
until it is given, and a given one wins over the row. Nothing else sets these values, and a run prints what they came
to before it starts. Imports no jax, so that a config can be checked before any of it is loaded.
"""

import dataclasses

ADVANTAGES = ('group_std', 'group_mean', 'leave_one_out', 'batch_std', 'group_batch_std')
RATIOS = ('token', 'sequence', 'sequence_mean')
SURROGATES = ('clip', 'weight')
DENOMINATORS = ('sequence', 'token', 'constant')
ESTIMATORS = ('k1', 'k2', 'k3')
IMPORTANCE = ('none', 'truncate', 'mask', 'mask_sequence')


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is maximised, and on which samples.

  advantage: `grpo.advantages`; ratio: level of pi / pi_old, `grpo.at_level`; surrogate: 'clip' (PPO's minimum) or
  'weight' (clipped importance weight on log pi); clip_low, clip_high: the ratio is held in 1 - low .. 1 + high;
  loss_denominator: `grpo.token_weights`; kl: estimator, `grpo.KL`; kl_weight: beta, 0 keeps no reference;
  refill_rounds: times more that a step may sample until all its groups differ in reward, 0 never; overlong_filter:
  samples cut at their limit are left out of the loss.
  """

  advantage: str = 'group_std'
  ratio: str = 'token'
  surrogate: str = 'clip'
  clip_low: float = 0.2
  clip_high: float = 0.2
  loss_denominator: str = 'token'
  kl: str = 'k3'
  kl_weight: float = 0.0
  refill_rounds: int = 0
  overlong_filter: bool = False

  def __str__(self) -> str:
    kl = f'{self.kl} x {self.kl_weight:g} in the loss' if self.kl_weight else 'none'
    return (f'advantage {self.advantage}, ratio by {self.ratio} in {max(0, 1 - self.clip_low):g}..'
            f'{1 + self.clip_high:g} ({self.surrogate}), mean by {self.loss_denominator}, KL {kl}, '
            f'refill_rounds {self.refill_rounds}, overlong_filter {self.overlong_filter}')


OBJECTIVES: dict[str, Objective] = {
  # Ours, the default: GRPO with DAPO's mean over tokens and higher upper clip, and R1's KL weight.
  'grpo_token': Objective(clip_high=0.28, kl_weight=1e-3),
  # DeepSeekMath (arXiv:2402.03300) eq. 3 and sec. 4.2. The clip range is not published: PPO's usual one.
  'grpo': Objective(loss_denominator='sequence', kl_weight=0.04),
  # DeepSeek-R1 (arXiv:2501.12948) eq. 1 and 2 as printed: one ratio and one KL term for a whole answer. Clip 10: only a
  # ratio above 11 is held. The ratio of a long answer is a product of many, so keep to one update a rollout.
  'grpo_sequence': Objective(ratio='sequence', clip_low=10.0, clip_high=10.0, loss_denominator='sequence',
                             kl_weight=1e-3),
  # Dr. GRPO (arXiv:2503.20783): neither standard deviation nor length in any denominator.
  'dr_grpo': Objective(advantage='group_mean', loss_denominator='constant'),
  # DAPO (arXiv:2503.14476): its soft penalty on long answers is a reward, the term `overlong`. Differs from the paper:
  # a group is used where its rewards differ, whatever term makes the difference, not only where its accuracy does.
  'dapo': Objective(clip_high=0.28, refill_rounds=9, overlong_filter=True),
  # GSPO (arXiv:2507.18071): the ratio of an answer is its tokens' geometric mean, so its clip range is far narrower.
  'gspo': Objective(ratio='sequence_mean', clip_low=3e-4, clip_high=4e-4, loss_denominator='sequence'),
  # CISPO (MiniMax-M1, arXiv:2506.13585): no token loses its gradient. The upper end, 5, is ScaleRL's; no lower one.
  'cispo': Objective(surrogate='weight', clip_low=1.0, clip_high=4.0),
  # RLOO (arXiv:2402.14740): an answer is one action. The paper has no clip; at one update a rollout this one is idle.
  'rloo': Objective(advantage='leave_one_out', ratio='sequence', loss_denominator='sequence'),
  # REINFORCE++ (arXiv:2501.03262), and with the group mean as baseline. Differs from the paper in that the KL term of
  # the first acts on each token by itself rather than on the return that follows it; weights are ours.
  'reinforce_plus_plus': Objective(advantage='batch_std', kl='k1', kl_weight=1e-3),
  'reinforce_plus_plus_baseline': Objective(advantage='group_batch_std', kl='k2', kl_weight=1e-3),
}
FINER = ('advantage', 'clip_low', 'clip_high', 'loss_denominator', 'kl', 'kl_weight', 'refill_rounds',
         'overlong_filter')  # the keys of config.rl that change a row


def chosen(rl) -> Objective:
  """The row that config.rl names, with the finer keys that are given laid over it. Raises KeyError for another name."""
  given = {key: rl[key] for key in FINER if rl[key] is not None}
  return dataclasses.replace(OBJECTIVES[rl.objective], **given)
