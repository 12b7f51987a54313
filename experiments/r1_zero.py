"""R1-Zero: GRPO with rule-based rewards from a base, no supervised start (DeepSeek-R1, arXiv:2501.12948, sec. 2.2).

    python -m moe_rl.main --config=experiments/r1_zero.py            # tiny: about 3 minutes on two CPU cores
    python -m moe_rl.main --config=experiments/r1_zero.py:v3_671b --config.task.name=math --config.task.path=FILE

`tiny` starts from the base in the package and is tuned for two CPU cores. Every other preset has the paper's settings
where they are published: 512 questions x 16 samples a rollout, 16 updates of 512 samples each, one pass, learning rate
3e-6, KL 0.001, temperature 1, reference refreshed every 400 updates = 25 rollouts, accuracy and format of equal weight,
32,768 tokens (the paper doubles them at update 8,200). Not published, ours: clip range, AdamW betas, loss denominator.
Not yet run at those sizes.

`PRESET@SLICE` adds what makes it fit a TPU slice, such as `moonlight_16b@v5p:2x2x4`: the table is below, the plans are
in plans/. A rollout of 8,192 samples wants a pod's memory for its cache; a smaller slice takes a part of it in as many
times more steps. So updates (512 samples each), samples and the reference's refreshes stay the paper's in number; what
it changes is that the policy which samples is newer.
"""

from moe_rl.config import base_config
from moe_rl.refusals import refuse

MOMENTS = {'optim.moment_dtype': 'bfloat16'}  # as V3 has them
# Where a cache of 57 kB a token and the state of a dense model share little memory: short answers, moments as V3 has
# them, several rows in a microbatch, as weights are gathered once in it, and an evaluation no larger than a rollout.
TIGHT = {'sampling.max_new_tokens': 2048, 'rl.microbatch_rows': 16, 'eval.problems': 64, 'eval.samples': 16} | MOMENTS
# Preset -> slice -> (a step's rollout is the paper's over this, what else differs).
SLICES = {
  'v3_671b': {
    'v5p:8x8x16': (1, {'mesh.data': 1, 'mesh.fsdp': 4, 'mesh.expert': 64, 'mesh.tensor': 4} | MOMENTS),
    # With half the rollout, rather than a quarter, sampling is 3.9 GiB over.
    'tpu7x:4x8x8': (4, {'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.expert': 64, 'mesh.tensor': 4} | MOMENTS),
  },
  'moonlight_16b': {
    'v5p:2x2x4': (4, {'mesh.data': 1, 'mesh.fsdp': 1, 'mesh.expert': 16}),
    'v6e:8x8': (4, {'mesh.data': 1, 'mesh.fsdp': 4, 'mesh.expert': 16}),
  },
  'qwen2_5_7b': {
    'v5e:4x4': (16, {'mesh.data': 1, 'mesh.fsdp': 4, 'mesh.tensor': 4} | TIGHT),
    'v6e:2x4': (16, {'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.tensor': 4} | TIGHT),
  },
}


def get_config(preset: str = 'tiny'):
  preset, at, topology = preset.partition('@')
  config = base_config(preset)
  known = ', '.join(f'{p}@{s}' for p in SLICES for s in SLICES[p])
  refuse(at and topology not in SLICES.get(preset, {}),
         f"'{preset}@{topology}' is not in the table of experiments/r1_zero.py, which has {known}: set config.mesh "
         'yourself; `python -m moe_rl.plan --suggest` finds one')
  if preset in ('tiny', 'tiny_dense'):
    config.init_from = 'embedded' if preset == 'tiny' else ''  # no dense base is in the package: name one
    config.optim.lr, config.optim.final_lr = 2.5e-4, 4e-5
    config.optim.warmup_steps, config.optim.beta2 = 10, 0.99  # Adam's first full-size steps can break the base's sums
    config.optim.clip_norm = 0.25  # the median gradient; later ones of few untied groups are up to five times larger
    config.rl.steps = 100
    # A tie in the router that rounding decides the other way moves a token by 2e-2 nats, about once in ten runs.
    config.rl.replay_routing = preset == 'tiny'
    config.sampling.max_new_tokens = 72  # seven steps of two-digit sums take 63
    return config
  config.template = 'r1_zero'
  config.task.name = 'math'
  config.sampling.max_new_tokens = min(32_768, config.model.max_length * 3 // 4)
  config.rl.steps = 650
  config.rl.prompts_per_step, config.rl.group_size, config.rl.minibatches = 512, 16, 16
  config.rl.objective, config.rl.kl_weight = 'grpo', 1e-3
  config.rl.reference_every = 25
  config.optim.lr = config.optim.final_lr = 3e-6
  config.rewards.weights = 'accuracy=1,format=1'
  config.rewards.workers = 16
  config.eval.every, config.checkpoint.every = 10, 5
  if at:
    for_slice(config, *SLICES[preset][topology])
  return config


def for_slice(config, part: int, changes: dict):
  """Takes 1 / part of a rollout in a step, part times as many steps."""
  for key in ('prompts_per_step', 'minibatches'):
    config.rl[key] //= part
  for section, key in (('rl', 'steps'), ('rl', 'reference_every'), ('eval', 'every'), ('checkpoint', 'every')):
    config[section][key] *= part
  config.update_from_flattened_dict(changes)
