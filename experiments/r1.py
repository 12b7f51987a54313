"""DeepSeek-R1 as a list of stages (arXiv:2501.12948v2, sec. 2 and 3).

    python -m moe_rl.main --config=experiments/r1.py            # tiny: under half an hour on two CPU cores
    python -m moe_rl.main --config=experiments/r1.py --config.stages.zero.rl.steps=20 --config.seed=1

zero         R1-Zero: RL from the base with rules alone
cold_data    its answers that are correct, well-formed and in one language
cold_start   Dev1: the base, fine-tuned on those
reasoning    Dev2: RL with the share of the language in the reward
traces       rejection sampling from Dev2, one good answer a prompt; general: text of another kind, and tastes in it
second_sft   Dev3: the base again, fine-tuned on both
preference   a reward model of those tastes
final        R1: RL with rules on reasoning, and the reward model on general prompts, which come in towards the end

A stage is an ordinary config, config.stages.NAME, and can be run alone; `{NAME}` in a text is the folder of another.
Where the paper has 800 thousand traces, `tiny` has about fifteen hundred.
"""

from moe_rl.config import add_stage, pipeline_config

LANGUAGE = 'en'
RULES = 'accuracy=1,format=0.1'


def get_config(preset: str = 'tiny'):
  if preset != 'tiny':
    raise ValueError(f"experiments/r1.py has the preset tiny alone, not '{preset}': larger models take the same list, "
                     'stage by stage, with experiments/r1_zero.py, sft.py, rejection.py and reward_model.py')
  config = pipeline_config()
  config.given.base = 'embedded'
  config.rows = ('zero', 'cold_start', 'reasoning', 'second_sft', 'final')
  config.evaluation.eval.samples = 4
  config.evaluation.eval.language = LANGUAGE
  config.evaluation.sampling.max_new_tokens = 72

  policy(config, 'zero', 'embedded', steps=50, rewards=RULES)

  cold = rejection(config, 'cold_data', '{zero}', prompts=768, samples=4, keep='all')
  cold.sample.min_language = 1.0
  fine_tuned(config, 'cold_start', 'embedded', '{cold_data}/traces.jsonl@400', epochs=2)

  policy(config, 'reasoning', '{cold_start}', steps=40, rewards=f'{RULES},language:{LANGUAGE}=0.3')

  rejection(config, 'traces', '{reasoning}', prompts=1024, samples=2, keep='one')
  add_stage(config, 'general', 'general_data')
  fine_tuned(config, 'second_sft', 'embedded', '{traces}/traces.jsonl,{general}/general.jsonl', epochs=2)

  taste = add_stage(config, 'preference', 'reward_model')
  taste.init_from, taste.reward_model.path = '{second_sft}', '{general}/pairs.jsonl'
  taste.optim.lr, taste.optim.final_lr, taste.optim.warmup_steps = 1e-3, 1e-4, 5
  taste.reward_model.examples_per_step = 32

  final = policy(config, 'final', '{second_sft}', steps=40, rewards=f'{RULES},language=0.3,model=0.2')
  final.sampling.temperature = 0.7
  final.rewards.model, final.task.general_path = '{preference}', '{general}/prompts.jsonl'
  final.rl.general_share, final.rl.general_from = 0.25, 30  # R1: the last 400 of 1,700 steps
  return config


def policy(config, name: str, init_from: str, steps: int, rewards: str):
  """RL with the settings of experiments/r1_zero.py, for fewer steps."""
  c = add_stage(config, name, 'rl')
  c.init_from, c.rl.steps, c.rewards.weights = init_from, steps, rewards
  c.sampling.max_new_tokens = 72
  c.optim.lr, c.optim.final_lr, c.optim.warmup_steps = 2.5e-4, 4e-5, 5
  c.optim.beta2, c.optim.clip_norm = 0.99, 0.25
  c.rl.replay_routing = True
  c.eval.every, c.eval.problems, c.checkpoint.every = 0, 64, 20  # the list's own evaluations are the larger ones
  return c


def rejection(config, name: str, init_from: str, prompts: int, samples: int, keep: str):
  c = add_stage(config, name, 'sample')
  c.init_from, c.sampling.max_new_tokens = init_from, 72
  c.sample.prompts, c.sample.samples, c.sample.keep = prompts, samples, keep
  c.sample.language = LANGUAGE
  return c


def fine_tuned(config, name: str, init_from: str, path: str, epochs: int):
  c = add_stage(config, name, 'sft')
  c.init_from, c.sft.path, c.sft.epochs = init_from, path, epochs
  c.sft.rows_per_step = 16
  c.optim.lr, c.optim.final_lr = 3e-4, 3e-5
  return c
