"""R1-Zero: GRPO with rule-based rewards from a base model, no supervised start (DeepSeek-R1, arXiv:2501.12948, sec. 2.2)."""

from moe_rl.config import base_config


def get_config(preset: str = 'tiny'):
  config = base_config(preset)
  config.init_from = 'embedded' if preset == 'tiny' else ''
  return config
