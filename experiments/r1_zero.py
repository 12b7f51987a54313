"""R1-Zero: GRPO with rule-based rewards from a base, no supervised start (DeepSeek-R1, arXiv:2501.12948, sec. 2.2).

    python -m moe_rl.main --config=experiments/r1_zero.py            # tiny: about 7 minutes on two busy CPU cores
    python -m moe_rl.main --config=experiments/r1_zero.py:v3_671b --config.task.name=math --config.task.path=FILE

`tiny` starts from the base in the package and is tuned for two CPU cores. Every other preset has the paper's settings
where they are published: 512 questions x 16 samples a rollout, 16 updates of 512 samples each, one pass, learning rate
3e-6, KL 0.001, temperature 1, reference refreshed every 400 updates = 25 rollouts, accuracy and format of equal weight,
32,768 tokens (the paper doubles them at update 8,200). Not published, ours: clip range, AdamW betas, loss denominator.
Not yet run at those sizes.
"""

from moe_rl.config import base_config


def get_config(preset: str = 'tiny'):
  config = base_config(preset)
  if preset == 'tiny':
    config.init_from = 'embedded'
    config.optim.lr, config.optim.final_lr = 2.5e-4, 4e-5
    config.optim.warmup_steps, config.optim.beta2 = 10, 0.99  # Adam's first full-size steps can break the base's sums
    config.optim.clip_norm = 0.25  # the median gradient; later ones of few untied groups are up to five times larger
    config.rl.steps = 100
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
  return config
