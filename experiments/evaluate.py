"""Evaluation of any checkpoint as DeepSeek-R1 (arXiv:2501.12948) evaluates: pass@1 over several samples a problem.

    python -m moe_rl.main --config=experiments/evaluate.py    # tiny: the base in the package, about a minute
    python -m moe_rl.main --config=experiments/evaluate.py:qwen2_5_math_1_5b --config.init_from=DIR \\
      --config.tokenizer=DIR --config.template=chat --config.task.name=math --config.task.path=FILE --workdir=runs/math

`tiny` samples as the default R1-Zero run evaluates itself. Every other preset has the paper's temperature 0.6, top-p
0.95 and 32,768 tokens (as far as the model goes), and 16 samples, as for MATH; the paper takes 64 for AIME and GPQA.
Templates: 'r1_zero' for what that experiment has trained, 'chat' for released models. Not yet run at those sizes.
"""

from moe_rl.config import base_config


def get_config(preset: str = 'tiny'):
  config = base_config(preset, 'evaluate')
  if preset == 'tiny':
    config.init_from = 'embedded'
    config.sampling.max_new_tokens = 72
    return config
  config.template = 'r1_zero'
  config.task.name = 'math'
  config.sampling.max_new_tokens = min(32_768, config.model.max_length * 3 // 4)
  config.eval.problems, config.eval.samples = 0, 16
  config.eval.temperature, config.eval.top_p = 0.6, 0.95
  config.rewards.workers = 16
  return config
