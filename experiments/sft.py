r"""Supervised fine-tuning on traces: the first and the third stage of DeepSeek-R1 (arXiv:2501.12948, sec. 2.3).

    python -m moe_rl.main --config=experiments/sft.py --config.sft.path=traces.jsonl                # tiny
    python -m moe_rl.main --config=experiments/sft.py:v3_671b --config.init_from=DIR --config.tokenizer=DIR \
      --config.sft.path=reasoning.jsonl,general.jsonl@200000

`tiny` starts from the base in the package. Every other preset has R1's published settings: 2 epochs (the paper: 2 to
3), cosine from 5e-5 to 5e-6, context of 32,768 tokens, batch of 128, which is read here as 128 packed rows. Not
published, ours: AdamW betas, weight decay. Not yet run at those sizes.
"""

from moe_rl.config import base_config


def get_config(preset: str = 'tiny'):
  config = base_config(preset, 'sft')
  if preset in ('tiny', 'tiny_dense'):
    config.init_from = 'embedded' if preset == 'tiny' else ''  # no dense base is in the package: name one
    config.optim.lr, config.optim.final_lr = 3e-4, 3e-5
    return config
  config.template = {'v3_671b': 'r1', 'small': 'r1_zero'}.get(preset, 'chat')
  config.optim.lr, config.optim.final_lr = 5e-5, 5e-6
  config.sft.rows_per_step = 128
  config.sft.row_tokens = 32_768
  config.checkpoint.every = 100
  return config
