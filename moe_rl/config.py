"""The experiment's config: one base with every key and its unit, lists of stages, and what is derived from them."""

import dataclasses
import difflib
import json
import os

import ml_collections
from ml_collections import config_dict

from moe_rl.data.corpus import Mix
from moe_rl.data.tasks import Chain
from moe_rl.models.config import PRESETS, ModelConfig, from_fields, own_fields
from moe_rl.models.hf_config import from_hf_config
from moe_rl.refusals import choose, refuse

EVAL_SAMPLES = 512  # at once, about, where RL evaluates
MICROBATCH_TOKENS = 512  # a device, where microbatch_rows is left to be derived
TRAINING = ('task', 'optim', 'checkpoint')
# Stage -> the sections that it reads; those that are named nowhere here are read by all.
STAGES = {'pretrain': (*TRAINING, 'pretrain', 'corpus'), 'sft': ('optim', 'checkpoint', 'sft'),
          'rl': (*TRAINING, 'rl', 'sampling', 'rewards', 'eval'),
          'evaluate': ('task', 'sampling', 'rewards', 'eval'), 'sample': ('task', 'sampling', 'rewards', 'sample'),
          'reward_model': ('optim', 'checkpoint', 'reward_model'), 'general_data': ('general_data',), 'export': ()}
# Keys of those sections that a stage does not read, and does not show.
UNREAD = {'rl': ('sampling.batch_samples', 'model.mtp_layers'),
          'evaluate': ('eval.every', 'sampling.temperature', 'sampling.top_k', 'sampling.top_p', 'task.decontaminate'),
          'sample': ('task.eval_path', 'rewards.weights')}


def model_of(preset: str) -> ModelConfig:
  """The sizes of a preset, or of the weights in a folder by its config.json. Raises ValueError as `base_config`."""
  if preset in PRESETS:
    return ModelConfig(**PRESETS[preset])
  if not os.path.isdir(preset):
    near = difflib.get_close_matches(preset, PRESETS, 1)
    raise ValueError(f"no preset '{preset}', and no folder" + (f": did you mean '{near[0]}'?" if near else
                                                               f": use one of {', '.join(PRESETS)}"))
  path = os.path.join(preset, 'config.json')
  try:
    with open(path) as file:
      found = json.load(file)
  except (OSError, ValueError) as e:
    raise ValueError(f"preset '{preset}' is a folder whose config.json cannot be read ({e}): give a folder with "
                     'weights in it, or a preset') from None
  sizes = from_fields(found['model']) if 'model' in found else from_hf_config(found, path)
  return dataclasses.replace(sizes, mtp_layers=0)  # only some weights have it, and no answer needs it


def base_config(preset: str = 'tiny', stage: str = 'rl') -> ml_collections.ConfigDict:
  """Every key that the stage reads, at its default. Experiments change values and add no key.

  preset: a name, or a folder with weights of one's own (Hugging Face's or a run's), which is then config.init_from
  too, and config.tokenizer if one lies with them. Raises ValueError for another, or an unknown stage, naming the
  nearest.
  """
  choose('stage', stage, tuple(STAGES))
  folder = preset if preset not in PRESETS and os.path.isdir(preset) else ''
  c = ml_collections.ConfigDict()
  c.stage = stage  # a key of STAGES
  c.seed = 0
  changes = dict(head='scalar', mtp_layers=0) if stage == 'reward_model' else {}
  c.model = own_fields(dataclasses.replace(model_of(preset), **changes))  # the keys that this kind of model reads
  for key in ('yarn', 'llama3'):
    if key in c.model and c.model[key] is None:  # a placeholder keeps the key's type open: None or a section
      c.model[key] = config_dict.placeholder(ml_collections.ConfigDict)
  # '': random weights; 'embedded', 'embedded_dense': the bases in the package; or a Hugging Face folder, a hub id
  # (ORGANISATION/NAME), a .safetensors file of ours, or the workdir of a run, of which the newest checkpoint is taken
  c.init_from = folder
  # 'tiny', or the path of a sentencepiece model, of a tokenizer.json or of a folder with one
  c.tokenizer = folder if os.path.exists(os.path.join(folder, 'tokenizer.json')) else 'tiny'
  c.template = 'short'  # 'short', 'r1_zero', 'r1', 'r1_think', or 'chat': the tokenizer's own chat template

  c.task = ml_collections.ConfigDict()
  c.task.name = 'chain'  # 'chain' (procedural), or 'gsm8k', 'math', 'countdown', 'choice', 'mbpp', 'jsonl' (files)
  c.task.path = ''  # training problems of a file task
  c.task.eval_path = ''  # its held-out problems; '': the last eval.problems of `path`, which then are not trained on
  c.task.decontaminate = ''  # evaluation files, by commas: training problems that share 10 words with one are left out
  c.task.general_path = ''  # general prompts of RL, JSON lines with `question` only; '': none
  c.task.seed = 0
  c.task.min_terms = 4
  c.task.max_terms = 8
  c.task.max_total = 50

  c.device_hour = 0.0  # $ of one device for an hour, for the summary's costs; 0: as in planner/prices.py, CPUs nothing

  c.mesh = ml_collections.ConfigDict()  # devices along each axis; one may be -1: whatever is left
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.expert = 1
  c.mesh.tensor = 1

  c.optim = ml_collections.ConfigDict()
  c.optim.lr = 3e-4
  c.optim.final_lr = 3e-4  # at the last step, by cosine
  c.optim.warmup_steps = 0
  c.optim.beta1 = 0.9
  c.optim.beta2 = 0.95
  c.optim.weight_decay = 0.0  # on matrices
  c.optim.moment_dtype = 'float32'  # of Adam's two moments between updates; V3 has 'bfloat16'
  c.optim.clip_norm = 1.0  # global gradient norm; 0: off

  c.pretrain = ml_collections.ConfigDict()
  c.pretrain.steps = 1000
  c.pretrain.rows_per_step = 32
  c.pretrain.row_tokens = 128
  c.pretrain.microbatch_rows = 32  # rows in one forward and backward pass
  c.pretrain.mtp_weight = 0.3  # lambda of V3 eq. 25
  c.pretrain.balance_weight = 1e-4  # alpha of V3 eq. 17
  c.pretrain.bias_rate = 1e-3  # router bias a step, gamma of V3 sec. 2.1.2
  c.corpus = dataclasses.asdict(Mix())

  c.sft = ml_collections.ConfigDict()
  c.sft.path = ''  # traces, JSON lines with question and response: FILE, or FILE,FILE,…; FILE@N: its first N traces
  c.sft.epochs = 2
  c.sft.rows_per_step = 32  # packed rows
  c.sft.row_tokens = 0  # width of a packed row; longer examples are left out, counted and named; 0: as the longest
  c.sft.microbatch_rows = 0  # rows in one forward and backward pass; 0: derived, about 1,024 tokens a device
  c.sft.balance_weight = 0.0  # alpha of V3 eq. 17
  c.sft.bias_rate = 0.0  # router bias a step
  c.sft.teacher = ''  # weights to distil from, named as in init_from, with the same vocabulary; '': text alone
  c.sft.teacher_weight = 0.5  # loss = (1 - teacher_weight) cross-entropy + teacher_weight divergence
  c.sft.divergence = 'forward'  # 'forward': KL(teacher || student), 'reverse': KL(student || teacher)

  c.rl = ml_collections.ConfigDict()
  c.rl.steps = 100  # rollouts
  c.rl.prompts_per_step = 32
  c.rl.group_size = 8  # completions a prompt
  c.rl.general_share = 0.0  # of a step's prompts, where there is task.general_path
  c.rl.general_from = 0  # steps before general prompts are mixed in; R1: 1,300 of 1,700
  c.rl.minibatches = 1  # optimizer updates a rollout
  c.rl.epochs = 1  # passes over a rollout
  # Names the settings of the keys that follow and are None; the table is in rl/objectives.py: 'grpo_token', 'grpo',
  # 'grpo_sequence', 'dr_grpo', 'dapo', 'gspo', 'cispo', 'rloo', 'reinforce_plus_plus', 'reinforce_plus_plus_baseline'
  c.rl.objective = 'grpo_token'
  # 'group_std' (GRPO), 'group_mean' (Dr. GRPO), 'leave_one_out' (RLOO), 'batch_std', 'group_batch_std' (REINFORCE++)
  c.rl.advantage = config_dict.placeholder(str)
  c.rl.loss_denominator = config_dict.placeholder(str)  # 'sequence' (GRPO), 'token' (DAPO), 'constant' (Dr. GRPO)
  c.rl.clip_low = config_dict.placeholder(float)  # ratio is clipped to 1 - clip_low .. 1 + clip_high
  c.rl.clip_high = config_dict.placeholder(float)
  c.rl.kl = config_dict.placeholder(str)  # estimator: 'k1', 'k2', 'k3'
  c.rl.kl_weight = config_dict.placeholder(float)  # beta; 0: no reference is kept
  c.rl.refill_rounds = config_dict.placeholder(int)  # times more that a step may sample to fill up with untied groups
  c.rl.overlong_filter = config_dict.placeholder(bool)  # samples that were cut are left out of the loss
  c.rl.old_logp = 'sampler'  # the old log-probs: 'sampler', or 'trainer', computed again before the first update
  c.rl.importance = 'none'  # weights from sampler to trainer: 'none', 'truncate' (TIS), 'mask' (MIS), 'mask_sequence'
  c.rl.importance_range = (0.5, 2.0)  # a weight is cut to the upper end ('truncate'), or must lie between the two
  c.rl.replay_routing = False  # the sampler's expert choices hold in scoring and update; gates are computed anew
  c.rl.reference_every = 400  # steps between refreshes of the reference; 0: never
  c.rl.reference_memory = 'device'  # where the reference lies between its uses: 'device', or sharded in 'host' memory
  c.rl.bias_rate = 0.0  # router bias a step; frozen by default, as released MoE RL recipes have it
  c.rl.row_tokens = 0  # width of a packed row; 0: derived, at least 128 and the longest sample
  c.rl.microbatch_rows = 0  # rows in one forward and backward pass; 0: derived, about 1,024 tokens a device

  c.sampling = ml_collections.ConfigDict()  # of the rollouts, and of rejection sampling
  c.sampling.temperature = 1.0
  c.sampling.top_k = 0  # 0: off
  c.sampling.top_p = 1.0
  c.sampling.max_prompt_tokens = 0  # longer prompts are left out, counted and named; 0: as the task needs
  c.sampling.max_new_tokens = 96
  c.sampling.batch_samples = 512  # at once, about: what memory holds

  c.rewards = ml_collections.ConfigDict()
  # Terms and weights; also language[:xx], repetition[:n], length, overlong[:n]: the table is in rl/rewards/terms.py
  c.rewards.weights = 'accuracy=1,format=0.1'
  c.rewards.model = ''  # for the term `model`: workdir of a run of the stage reward_model
  c.rewards.timeout_s = 5.0  # wall seconds an answer
  c.rewards.workers = 2  # processes
  c.rewards.memory_mb = 2048  # a worker

  c.eval = ml_collections.ConfigDict()
  c.eval.every = 20  # steps; 0: only before and after
  c.eval.problems = 256  # the first of the task; 0: all of the file (stage 'evaluate')
  c.eval.samples = 4  # a problem
  c.eval.temperature = 1.0
  c.eval.top_p = 1.0
  c.eval.language = ''  # that thinking is measured against, such as 'en'; '': the question's

  c.sample = ml_collections.ConfigDict()  # rejection sampling
  c.sample.prompts = 0  # the first of the training problems; 0: all of the file
  c.sample.samples = 16  # a prompt
  c.sample.well_formed = True  # the format term must be 1: `<think> … </think> <answer> … </answer>`
  c.sample.language = ''  # that the thinking must be in, such as 'en'; '': the question's
  c.sample.min_language = 0.9  # least share of its words, 0 to 1; there is none without thinking
  c.sample.min_repetition = -0.2  # least repetition term, -1 to 0: minus the share of repeated runs of 8 words
  c.sample.keep = 'all'  # of a prompt's good samples: 'all', 'one' (the first), 'shortest' or 'longest'

  c.reward_model = ml_collections.ConfigDict()
  c.reward_model.kind = 'helpfulness'  # pairs, by the final summary alone; 'safety': whole responses, safe or not
  c.reward_model.path = ''  # JSON lines: question, chosen, rejected; or question, response, safe (true or false)
  c.reward_model.eval_path = ''  # held-out ones; '': the last `held_out` of `path`, which then are not trained on
  c.reward_model.held_out = 200  # examples
  c.reward_model.balance_lengths = True  # leaves out pairs until the better answers are as long as the others
  c.reward_model.epochs = 1
  c.reward_model.examples_per_step = 256  # pairs, or responses
  c.reward_model.row_tokens = 0  # longer examples (a pair is one) are left out; 0: derived from the longest
  c.reward_model.microbatch_rows = 0  # rows in one forward and backward pass; 0: derived, about 1,024 tokens a device
  c.reward_model.eval_every = 0  # steps; 0: only before and after

  c.general_data = ml_collections.ConfigDict()  # lines of what data/general.py writes for the tiny model
  c.general_data.traces = 500
  c.general_data.pairs = 1000
  c.general_data.prompts = 200

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 20  # steps; 0: only at the end
  c.checkpoint.keep = 2
  for section in set().union(*STAGES.values()).difference(STAGES[stage]):
    del c[section]
  for key in UNREAD.get(stage, ()):
    section, _, name = key.partition('.')
    if name in c[section]:  # a dense model shows no mtp_layers
      del c[section][name]
  return c


def pipeline_config(preset: str = 'tiny') -> ml_collections.ConfigDict:
  """A list of stages that is still empty (`add_stage`), and the evaluation of their weights.

  order: names of stages, as they are run; rows: those whose weights are evaluated afterwards; given: name -> init_from
  of weights that are evaluated before all. In any text of a stage's config `{NAME}` is the folder of stage NAME.
  """
  c = ml_collections.ConfigDict({'stage': 'pipeline', 'seed': 0, 'tokenizer': 'tiny', 'order': (), 'rows': (),
                                 'given': {}, 'stages': {}})
  c.evaluation = base_config(preset, 'evaluate')
  c.evaluation.seed, c.evaluation.tokenizer = c.get_ref('seed'), c.get_ref('tokenizer')
  c.evaluation.init_from = '{each}'  # of the rows, in their turn
  return c


def add_stage(config, name: str, stage: str, preset: str = 'tiny') -> ml_collections.ConfigDict:
  """Appends a stage to a pipeline and returns its config, which shares the pipeline's seed and tokenizer."""
  section = base_config(preset, stage)
  section.seed, section.tokenizer = config.get_ref('seed'), config.get_ref('tokenizer')
  config.stages[name], config.order = section, (*config.order, name)
  return section


def model_config(config) -> ModelConfig:
  """config.model as the model reads it; fields of another kind of model, which it does not show, at their defaults."""
  return from_fields(config.model.to_dict())


def chain_task(config) -> Chain:
  t = config.task
  return Chain(t.seed, t.min_terms, t.max_terms, t.max_total)


def corpus_mix(config) -> Mix:
  return Mix(**config.corpus.to_dict())


def general_per_step(config) -> int:
  """General prompts in a step that has them."""
  return round(config.rl.general_share * config.rl.prompts_per_step)


def with_lengths(config, longest_prompt: int, rows_over: int = 1):
  """A copy with the lengths that were left to be derived, for a task whose longest kept prompt is `longest_prompt`
  tokens; rows_over: devices that rows are sharded over."""
  config = ml_collections.ConfigDict(config.to_dict())
  s = config.sampling
  s.max_prompt_tokens = s.max_prompt_tokens or -(-longest_prompt // 8) * 8
  if 'rl' not in config:
    return config
  r, length = config.rl, s.max_prompt_tokens + s.max_new_tokens
  r.row_tokens = r.row_tokens or max(128, -(-length // 16) * 16)
  refuse(r.row_tokens < length,
         f'config.rl.row_tokens {r.row_tokens} cannot hold a sample of {length} tokens (the longest prompt + '
         f'sampling.max_new_tokens): set it to {length} or more, or 0 to derive it')
  r.microbatch_rows = r.microbatch_rows or max(1, MICROBATCH_TOKENS // r.row_tokens) * rows_over
  return config


def with_row_tokens(config, longest: int, rows_over: int = 1):
  """A copy of an sft config with the sizes that were left to be derived, for a longest kept example of `longest`
  tokens; rows_over: devices that rows are sharded over."""
  config = ml_collections.ConfigDict(config.to_dict())
  s = config.sft
  s.row_tokens = s.row_tokens or max(128, -(-longest // 16) * 16)
  if not s.microbatch_rows:
    most, shares = max(1, MICROBATCH_TOKENS // s.row_tokens), s.rows_per_step // rows_over
    s.microbatch_rows = rows_over * max(n for n in range(1, min(most, shares) + 1) if shares % n == 0)
  return config


def with_example_length(config, longest: int, rows_over: int = 1):
  """A copy with the rows that config.reward_model leaves to be derived; longest: tokens of the longest example."""
  config = ml_collections.ConfigDict(config.to_dict())
  c = config.reward_model
  c.row_tokens = c.row_tokens or max(128, -(-longest // 16) * 16)
  c.microbatch_rows = c.microbatch_rows or max(1, MICROBATCH_TOKENS // c.row_tokens) * rows_over
  return config


def eval_prompts_per_batch(config) -> int:
  """Held-out prompts that RL samples at once: a multiple of the rollout's prompts a step."""
  e = config.eval
  return prompts_per_batch(EVAL_SAMPLES, e.samples, e.problems, config.rl.prompts_per_step)


def prompts_per_batch(batch_samples: int, samples: int, prompts: int, unit: int) -> int:
  """Prompts sampled at once: about `batch_samples` samples, no more prompts than there are (0: not known), a multiple
  of `unit`."""
  most = max(1, batch_samples // samples)
  return max(1, min(most, prompts or most) // unit) * unit


def minibatches_of_samples(config, processes: int) -> bool:
  """Whether a minibatch of RL has some samples of every prompt, and not all of some: for more hosts than the prompts of
  a minibatch can be dealt out to."""
  return config.rl.prompts_per_step % (processes * config.rl.minibatches) > 0


def mesh_sizes(config, devices: int) -> dict[str, int]:
  """Devices along each mesh axis, with -1 filled in. Raises ValueError when they do not multiply to `devices`."""
  sizes = dict(config.mesh.to_dict())
  free = [k for k, v in sizes.items() if v == -1]
  refuse(len(free) > 1, f'config.mesh: only one axis may be -1, not {free}')
  refuse(any(v < 1 and v != -1 for v in sizes.values()), f'config.mesh {sizes}: sizes are 1 or more, or -1')
  fixed = 1
  for k, v in sizes.items():
    fixed *= 1 if k in free else v
  if free:
    refuse(devices % fixed, f'config.mesh: {devices} devices do not divide by {fixed} (the fixed axes of {sizes}): '
           f'take divisors of {devices}')
    sizes[free[0]] = devices // fixed
  else:
    refuse(fixed != devices, f'config.mesh {sizes} needs {fixed} devices, there are {devices}: set one axis to -1')
  return sizes
