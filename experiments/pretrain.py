"""Pre-training (DeepSeek-V3, arXiv:2412.19437, sec. 4.2).

`tiny` makes the embedded base: a small DeepSeek-V3-style model on text of mixed care (moe_rl/data/corpus.py);
`tiny_dense` a dense student on the same text. Every other preset has V3's published settings; planned, not yet run at
those sizes.
"""

from moe_rl.config import base_config


def get_config(preset: str = 'tiny'):
  config = base_config(preset, 'pretrain')
  config.optim.weight_decay = 0.1
  if preset in ('tiny', 'tiny_dense'):
    config.optim.lr = 3e-3
    config.optim.final_lr = 3e-5
    config.optim.warmup_steps = 50
    config.pretrain.steps = 1700 if preset == 'tiny' else 900
    config.pretrain.rows_per_step = 32
    config.pretrain.row_tokens = 128
    config.checkpoint.every = 250
    return config
  config.optim.lr, config.optim.final_lr = 2.2e-4, 2.2e-5
  config.optim.warmup_steps = 2000
  config.optim.moment_dtype = 'bfloat16'
  config.pretrain.steps = 235_000  # 14.8T tokens
  config.pretrain.rows_per_step = 15_360
  config.pretrain.row_tokens = 4096
  config.pretrain.microbatch_rows = 15_360
  config.checkpoint.every = 500
  return config
