"""Pre-training (DeepSeek-V3, arXiv:2412.19437, sec. 4.2).

`tiny` makes the embedded base: a small DeepSeek-V3-style model on text of mixed care (moe_rl/data/corpus.py);
`tiny_dense` a dense student on the same text. Every other preset has V3's published settings; planned, not yet run at
those sizes. `PRESET@SLICE` adds what fits a TPU slice, by the table below; the plans are in plans/.
"""

from moe_rl.config import base_config
from moe_rl.refusals import refuse

# Preset -> slice -> what differs. On 512 chips 4 rows a chip, so more steps for 14.8T tokens; experts in groups of 8
# chips, a chip for each of the router's groups, so that a token goes to 4 chips at most.
SLICES = {'v3_671b': {'v5p:8x8x8': {'mesh.data': 1, 'mesh.fsdp': 64, 'mesh.expert': 8, 'pretrain.steps': 1_762_500,
                                    'pretrain.rows_per_step': 2048, 'pretrain.microbatch_rows': 2048}}}


def get_config(preset: str = 'tiny'):
  preset, at, topology = preset.partition('@')
  config = base_config(preset, 'pretrain')
  known = ', '.join(f'{p}@{s}' for p in SLICES for s in SLICES[p])
  refuse(at and topology not in SLICES.get(preset, {}),
         f"'{preset}@{topology}' is not in the table of experiments/pretrain.py, which has {known}: set config.mesh "
         'yourself; `python -m moe_rl.plan --suggest` finds one')
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
  if at:
    config.update_from_flattened_dict(SLICES[preset][topology])
  return config
