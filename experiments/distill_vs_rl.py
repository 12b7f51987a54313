"""The paper's own comparison (DeepSeek-R1, arXiv:2501.12948, sec. 4.1): the same small dense student by RL on it, or by
distillation from a larger teacher that RL has trained.

    python -m moe_rl.main --config=experiments/distill_vs_rl.py [--config.seed=1]

teacher    RL of the tiny mixture of experts
traces     its answers, one good one a prompt
distilled  the dense student, fine-tuned on them
student    the dense student by the teacher's RL, for the teacher's steps

Both students start from the dense base in the package. There are as many traces as make both ways take about the same
time (`summary.json` has each stage's seconds), compiling and sampling the traces included, training the teacher not.
"""

from moe_rl.config import add_stage, pipeline_config


def get_config(preset: str = 'tiny'):
  if preset != 'tiny':
    raise ValueError(f"experiments/distill_vs_rl.py has the preset tiny alone, not '{preset}'")
  config = pipeline_config()
  config.given.student_base = 'embedded_dense'
  config.rows = ('teacher', 'distilled', 'student')
  config.evaluation.sampling.max_new_tokens = 72

  by_rl(add_stage(config, 'teacher', 'rl'), 'embedded', steps=60)

  traces = add_stage(config, 'traces', 'sample')
  traces.init_from, traces.sampling.max_new_tokens = '{teacher}', 72
  traces.sample.prompts, traces.sample.samples, traces.sample.keep = 8192, 1, 'one'
  traces.sample.min_language = 0.0

  distilled = add_stage(config, 'distilled', 'sft', 'tiny_dense')
  distilled.init_from, distilled.sft.path = 'embedded_dense', '{traces}/traces.jsonl'
  distilled.sft.epochs, distilled.sft.rows_per_step = 3, 16
  distilled.optim.lr, distilled.optim.final_lr = 1e-3, 1e-4

  by_rl(add_stage(config, 'student', 'rl', 'tiny_dense'), 'embedded_dense', steps=60)
  return config


def by_rl(c, init_from: str, steps: int):
  """The settings of experiments/r1_zero.py, for fewer steps."""
  c.init_from, c.rl.steps = init_from, steps
  c.sampling.max_new_tokens = 72
  c.optim.lr, c.optim.final_lr, c.optim.warmup_steps = 2.5e-4, 4e-5, 5
  c.optim.beta2, c.optim.clip_norm = 0.99, 0.25
  c.rl.replay_routing = init_from == 'embedded'  # the student is dense
  c.eval.every, c.eval.problems, c.checkpoint.every = 0, 64, 20  # the list's own evaluations are the larger ones
