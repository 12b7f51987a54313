"""Pre-trains the embedded base: a tiny DeepSeek-V3-style model on text of mixed care (moe_rl/data/corpus.py)."""

from moe_rl.config import base_config


def get_config(preset: str = 'tiny'):
  config = base_config(preset, 'pretrain')
  config.optim.lr = 3e-3
  config.optim.final_lr = 3e-5
  config.optim.warmup_steps = 50
  config.optim.weight_decay = 0.1
  config.pretrain.steps = 1700
  config.pretrain.rows_per_step = 32
  config.pretrain.row_tokens = 128
  config.checkpoint.every = 250
  return config
