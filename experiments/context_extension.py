"""Context extension: pre-training goes on with longer rows (DeepSeek-V3, arXiv:2412.19437, sec. 4.3).

    python -m moe_rl.main --config=experiments/context_extension.py:v3_671b --config.init_from=runs/pretrain
    python -m moe_rl.main --config=experiments/context_extension.py:v3_671b --config.init_from=runs/context_extension \
      --config.pretrain.row_tokens=131072 --config.pretrain.rows_per_step=480 --workdir=runs/context_extension_2

V3's two phases: 1,000 steps each at 7.3e-6, rows of 32K tokens (1,920 a step), then of 128K (480). Positions are scaled
by YaRN where the preset's config.model.yarn has it, whether or not the weights were made with it. `tiny` goes from 128
to 512 tokens, without YaRN. Not yet run at other sizes.
"""

from moe_rl.config import base_config


def get_config(preset: str = 'tiny'):
  config = base_config(preset, 'pretrain')
  config.optim.weight_decay = 0.1
  if preset in ('tiny', 'tiny_dense'):
    config.init_from = {'tiny': 'embedded', 'tiny_dense': 'embedded_dense'}[preset]
    config.optim.lr, config.optim.final_lr = 3e-4, 3e-5
    config.pretrain.steps, config.pretrain.row_tokens = 50, 512
    config.pretrain.rows_per_step = config.pretrain.microbatch_rows = 8
    return config
  config.optim.lr = config.optim.final_lr = 7.3e-6
  config.optim.moment_dtype = 'bfloat16'
  config.pretrain.steps = 1000
  config.pretrain.row_tokens = min(32_768, config.model.max_length)
  config.pretrain.rows_per_step = config.pretrain.microbatch_rows = 1920
  config.checkpoint.every = 100
  return config
