"""Rejection sampling (DeepSeek-R1, arXiv:2501.12948, sec. 2.3.3): correct, readable samples as traces for SFT.

    python -m moe_rl.main --config=experiments/rejection.py --config.init_from=runs/r1_zero    # tiny: about a minute
    python -m moe_rl.main --config=experiments/rejection.py:v3_671b --config.init_from=DIR --config.tokenizer=DIR \\
      --config.task.name=math --config.task.path=FILE --workdir=runs/traces

`tiny` takes the base in the package unless told otherwise. The paper samples "multiple" responses a prompt at
temperature 1 and keeps the correct ones, without mixed languages, long paragraphs and code blocks; how many, is not
published: ours are 16. Not yet run at those sizes.
"""

from moe_rl.config import base_config


def get_config(preset: str = 'tiny'):
  config = base_config(preset, 'sample')
  if preset == 'tiny':
    config.init_from = 'embedded'
    config.sampling.max_new_tokens = 72
    config.sample.prompts, config.sample.samples = 256, 8
    return config
  config.template = 'r1_zero'
  config.task.name = 'math'
  config.sampling.max_new_tokens = min(32_768, config.model.max_length * 3 // 4)
  config.rewards.workers = 16
  return config
