r"""Distillation: a dense student fine-tuned on a teacher's traces (DeepSeek-R1, arXiv:2501.12948, sec. 2.4).

    python -m moe_rl.main --config=experiments/distill.py --config.sft.path=traces.jsonl \
      --config.init_from=runs/dense_base/base.safetensors                                           # tiny_dense
    python -m moe_rl.main --config=experiments/distill.py:qwen2_5_math_7b --config.init_from=DIR \
      --config.tokenizer=DIR --config.sft.path=traces.jsonl

Text alone, as the paper does; --config.sft.teacher=… adds the divergence from the teacher's distributions, for models
of one vocabulary. Presets other than `tiny_dense` and `tiny` have the paper's settings: 2 epochs (2 to 3), cosine to a
tenth of the learning rate, context of 32,768 tokens, batch of 64, which is read here as 64 packed rows; the learning
rate is that of the table, for models that are not in it R1's own 5e-5. Not yet run at those sizes.
"""

from moe_rl.config import base_config

LEARNING_RATES = {
  'qwen2_5_math_1_5b': 1e-4, 'qwen2_5_math_7b': 8e-5, 'qwen2_5_14b': 7e-5, 'qwen2_5_32b': 6e-5, 'llama3_1_8b': 5e-5,
  'llama3_3_70b': 2e-5,
  # Of the same sizes, not in the paper.
  'qwen2_5_1_5b': 1e-4, 'r1_distill_qwen_1_5b': 1e-4, 'qwen2_5_7b': 8e-5, 'qwen3_0_6b': 1e-4, 'qwen3_1_7b': 1e-4}


def get_config(preset: str = 'tiny_dense'):
  config = base_config(preset, 'sft')
  if preset in ('tiny', 'tiny_dense'):
    config.init_from = 'embedded' if preset == 'tiny' else ''  # no dense base is in the package: name one
    config.optim.lr, config.optim.final_lr = 1e-3, 1e-4
    return config
  config.template = {'v3_671b': 'r1', 'small': 'r1_zero'}.get(preset, 'chat')
  config.optim.lr = LEARNING_RATES.get(preset, 5e-5)
  config.optim.final_lr = config.optim.lr / 10
  config.sft.rows_per_step = 64
  config.sft.row_tokens = 32_768
  config.model.max_length = max(config.model.max_length, 32_768)  # Qwen2.5-Math's 4,096 are exceeded, as R1 does
  config.checkpoint.every = 100
  return config
