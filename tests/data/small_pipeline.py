"""A list of three stages; tests make them small with flags, and name the weights that they start from."""

from moe_rl.config import add_stage, pipeline_config


def get_config():
  config = pipeline_config()
  config.given.base = 'embedded'
  config.rows = ('zero', 'tuned')
  add_stage(config, 'zero', 'rl').init_from = 'embedded'
  traces = add_stage(config, 'traces', 'sample')
  traces.init_from, traces.sample.prompts, traces.sample.min_language = '{zero}', 8, 0.0
  tuned = add_stage(config, 'tuned', 'sft')
  tuned.init_from, tuned.sft.path, tuned.sft.epochs = '{zero}', '{traces}/traces.jsonl', 1
  return config
