"""A reward model for RL over all scenarios (DeepSeek-R1, arXiv:2501.12948v2, supplement).

    python -m moe_rl.main --config=experiments/reward_model.py --config.reward_model.path=pairs.jsonl

`tiny` starts from the base in the package; `python -m moe_rl.data.general` writes pairs for it. Every other preset has
the paper's settings: the policy's architecture with a scalar head, batches of 256, learning rate 6e-6, one epoch, up to
8,192 tokens a response (rows hold both of a pair). For safety give --config.reward_model.kind=safety and lines with
question, response and safe. Not published, ours: AdamW's betas. Not yet run at those sizes.
"""

from moe_rl.config import base_config


def get_config(preset: str = 'tiny'):
  config = base_config(preset, 'reward_model')
  if preset == 'tiny':
    config.init_from = 'embedded'
    config.optim.lr, config.optim.final_lr = 1e-3, 1e-4
    config.optim.warmup_steps = 5
    config.reward_model.examples_per_step = 32
    config.reward_model.held_out = 100
    return config
  config.template = 'r1'
  config.optim.lr = config.optim.final_lr = 6e-6
  config.reward_model.row_tokens = min(16_384, 2 * config.model.max_length)
  config.checkpoint.every = 20
  return config
