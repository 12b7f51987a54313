"""A list of the stages that several hosts run; tests make them small with flags, and name the first weights."""

from moe_rl.config import add_stage, pipeline_config


def get_config(stage: str = ''):
  """The list, or one of its stages by itself."""
  config = pipeline_config()
  config.rows = ('final',)
  add_stage(config, 'base', 'pretrain')
  add_stage(config, 'general', 'general_data')
  add_stage(config, 'traces', 'sample').init_from = 'embedded'
  tuned = add_stage(config, 'tuned', 'sft')
  tuned.init_from, tuned.sft.path = 'embedded', '{traces}/traces.jsonl'
  taste = add_stage(config, 'taste', 'reward_model')
  taste.init_from, taste.reward_model.path = '{tuned}', '{general}/pairs.jsonl'
  final = add_stage(config, 'final', 'rl')
  final.init_from, final.rewards.model, final.task.general_path = '{tuned}', '{taste}', '{general}/prompts.jsonl'
  return config.stages[stage] if stage else config
