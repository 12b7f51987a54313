"""The experiment's config: one base with every key and its unit, and the check of it before any compile."""

import dataclasses
import difflib
import math

import ml_collections
from ml_collections import config_dict

from moe_rl.data.corpus import Mix
from moe_rl.data.problem_formats import FORMATS
from moe_rl.data.tasks import Chain
from moe_rl.data.templates import NAMES as TEMPLATES
from moe_rl.models.config import PRESETS, ModelConfig, from_fields, own_fields
from moe_rl.models.hf_config import family
from moe_rl.rl import objectives
from moe_rl.rl.rewards import terms
from moe_rl.runtime import mesh as meshes

MICROBATCH_TOKENS = 2048  # a device, where rl.microbatch_rows is left to be derived
TRAINING = ('task', 'optim', 'checkpoint')
# Stage -> the sections that it reads; those that are named nowhere here are read by all.
STAGES = {'pretrain': (*TRAINING, 'pretrain', 'corpus'), 'rl': (*TRAINING, 'rl', 'sampling', 'rewards', 'eval'),
          'export': ()}


def base_config(preset: str = 'tiny', stage: str = 'rl') -> ml_collections.ConfigDict:
  """Every key that the stage reads, at its default. Experiments change values and add no key.

  Raises ValueError for an unknown model preset or stage, naming the nearest.
  """
  choose('stage', stage, tuple(STAGES))
  if preset not in PRESETS:
    near = difflib.get_close_matches(preset, PRESETS, 1)
    raise ValueError(f"no preset '{preset}'" + (f": did you mean '{near[0]}'?" if near else
                                                f": use one of {', '.join(PRESETS)}"))
  c = ml_collections.ConfigDict()
  c.stage = stage  # 'pretrain', 'rl' or 'export'
  c.seed = 0
  c.model = own_fields(ModelConfig(**PRESETS[preset]))  # the keys that this kind of model reads
  for key in ('yarn', 'llama3'):
    if key in c.model and c.model[key] is None:  # a placeholder keeps the key's type open: None or a section
      c.model[key] = config_dict.placeholder(ml_collections.ConfigDict)
  # '': random weights; 'embedded': the base in the package; or a Hugging Face folder, a hub id (ORGANISATION/NAME), a
  # .safetensors file of ours, or the workdir of a run, of which the newest checkpoint is taken
  c.init_from = ''
  c.tokenizer = 'tiny'  # 'tiny', or the path of a sentencepiece model, of a tokenizer.json or of a folder with one
  c.template = 'short'  # 'short', 'r1_zero', 'r1', 'r1_think', or 'chat': the tokenizer's own chat template

  c.task = ml_collections.ConfigDict()
  c.task.name = 'chain'  # 'chain' (procedural), or 'gsm8k', 'math', 'countdown', 'choice', 'mbpp', 'jsonl' (files)
  c.task.path = ''  # training problems of a file task
  c.task.eval_path = ''  # its held-out problems; '': the last eval.problems of `path`, which then are not trained on
  c.task.seed = 0
  c.task.min_terms = 4
  c.task.max_terms = 8
  c.task.max_total = 50

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

  c.rl = ml_collections.ConfigDict()
  c.rl.steps = 100  # rollouts
  c.rl.prompts_per_step = 32
  c.rl.group_size = 8  # completions a prompt
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
  c.rl.bias_rate = 0.0  # router bias a step; frozen by default, as released MoE RL recipes have it
  c.rl.row_tokens = 0  # width of a packed row; 0: derived, at least 128 and the longest sample
  c.rl.microbatch_rows = 0  # rows in one forward and backward pass; 0: derived, about 2,048 tokens a device

  c.sampling = ml_collections.ConfigDict()  # of the rollouts
  c.sampling.temperature = 1.0
  c.sampling.top_k = 0  # 0: off
  c.sampling.top_p = 1.0
  c.sampling.max_prompt_tokens = 0  # longer prompts are left out, counted and named; 0: as the task needs
  c.sampling.max_new_tokens = 96

  c.rewards = ml_collections.ConfigDict()
  # Terms and weights; also language[:xx], repetition[:n], length, overlong[:n]: the table is in rl/rewards/terms.py
  c.rewards.weights = 'accuracy=1,format=0.1'
  c.rewards.timeout_s = 5.0  # wall seconds an answer
  c.rewards.workers = 2  # processes
  c.rewards.memory_mb = 2048  # a worker

  c.eval = ml_collections.ConfigDict()
  c.eval.every = 20  # steps; 0: only before and after
  c.eval.problems = 256
  c.eval.samples = 4  # a problem
  c.eval.temperature = 1.0
  c.eval.top_p = 1.0

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 20  # steps; 0: only at the end
  c.checkpoint.keep = 2
  for section in set().union(*STAGES.values()).difference(STAGES[stage]):
    del c[section]
  return c


def model_config(config) -> ModelConfig:
  """config.model as the model reads it; fields of another kind of model, which it does not show, at their defaults."""
  return from_fields(config.model.to_dict())


def chain_task(config) -> Chain:
  t = config.task
  return Chain(t.seed, t.min_terms, t.max_terms, t.max_total)


def corpus_mix(config) -> Mix:
  return Mix(**config.corpus.to_dict())


def validate(config, devices: int, vocab_size: int) -> dict[str, int | float | str]:
  """Checks sizes against each other and returns the derived ones, to be printed. Touches no device, reads no data.

  devices: how many there are; vocab_size: the tokenizer's. Raises ValueError: the key, its value, the remedy.
  """
  choose('config.stage', config.stage, tuple(STAGES))
  missing = [section for section in STAGES[config.stage] if section not in config]
  refuse(missing, f"config.stage '{config.stage}' reads config.{', config.'.join(missing)}, which this experiment has "
                  f"not: start from base_config(preset, '{config.stage}')")
  choose('config.template', config.template, TEMPLATES)
  model = model_config(config)
  refuse(vocab_size > model.vocab_size,
         f'config.model.vocab_size {model.vocab_size} is smaller than the tokenizer ({vocab_size} pieces): '
         f'set it to {vocab_size} or more')
  sizes = mesh_sizes(config, devices)
  check_table(model, sizes)
  rows_over = meshes.rows_over(sizes)
  if 'optim' in STAGES[config.stage]:
    _validate_training(config)
  check = {'pretrain': _validate_pretrain, 'rl': _validate_rl, 'export': _validate_export}[config.stage]
  mesh = ' x '.join(f'{k}={v}' for k, v in sizes.items())
  return {'devices': devices, 'mesh': mesh, **check(config, model, rows_over)}


def _validate_training(config):
  o = config.optim
  choose('config.optim.moment_dtype', o.moment_dtype, ('float32', 'bfloat16'))
  refuse(o.lr <= 0, f'config.optim.lr {o.lr} must be positive')
  refuse(not o.clip_norm >= 0, f'config.optim.clip_norm {o.clip_norm} must not be negative; 0 turns it off')
  refuse(config.checkpoint.keep < 1, f'config.checkpoint.keep {config.checkpoint.keep}: keep at least 1')


def check_table(model: ModelConfig, sizes: dict[str, int]):
  """Raises ValueError where a weight does not divide over the mesh axes that the sharding table gives it."""
  def over(logical):
    axes = meshes.TRAINING[logical]
    return f'config.mesh.{" x ".join(axes)}', math.prod(sizes[axis] for axis in axes)
  for logical, what in (('embed', 'width'), ('experts', 'experts'), ('expert_rows', 'expert_ff'),
                        ('head_work', 'heads'), ('mlp', 'dense_ff'), ('vocab', 'vocab_size')):
    divides(f'config.model.{what}', getattr(model, what), *over(logical))
  columns = {'heads x qk_dim': model.heads * model.qk_dim, 'heads x v_dim': model.heads * model.v_dim}
  if model.attention == 'gqa':
    columns = {'kv_heads x head_dim': model.kv_heads * model.head_dim}
  for what, count in columns.items():
    where, axes = over('heads')
    refuse(count % axes, f'{where} ({axes}) does not divide config.model.{what} ({count}): take a divisor of that')


def _validate_pretrain(config, model, rows_over):
  p = config.pretrain
  positive('config.pretrain', p, ('steps', 'rows_per_step', 'row_tokens', 'microbatch_rows'))
  corpus_mix(config)
  divides('config.pretrain.rows_per_step', p.rows_per_step, 'config.pretrain.microbatch_rows', p.microbatch_rows)
  divides('config.pretrain.microbatch_rows', p.microbatch_rows, 'the mesh (data x fsdp x expert)', rows_over)
  refuse(p.row_tokens > model.max_length,
         f'config.pretrain.row_tokens {p.row_tokens} exceeds config.model.max_length {model.max_length}')
  tokens = p.rows_per_step * p.row_tokens
  return {'tokens_per_step': tokens, 'microbatches': p.rows_per_step // p.microbatch_rows,
          'tokens': tokens * p.steps}


def _validate_rl(config, model, rows_over):
  r, s, e = config.rl, config.sampling, config.eval
  positive('config.rl', r, ('steps', 'prompts_per_step', 'minibatches', 'epochs'))
  positive('config.sampling', s, ('temperature', 'max_new_tokens'))
  for key, value in (('sampling.max_prompt_tokens', s.max_prompt_tokens), ('rl.row_tokens', r.row_tokens),
                     ('rl.microbatch_rows', r.microbatch_rows)):
    refuse(value < 0, f'config.{key} {value}: must be positive, or 0 to derive it')
  positive('config.eval', e, ('problems', 'samples', 'temperature'))
  positive('config.rewards', config.rewards, ('timeout_s', 'workers'))
  refuse(config.rewards.memory_mb < 128,
         f'config.rewards.memory_mb {config.rewards.memory_mb} is too small for a worker (70 at rest): set 512 or more')
  objective = _validate_objective(r, model)
  choose('config.task.name', config.task.name, ('chain', *FORMATS))
  try:
    terms.validate(config.rewards.weights, s.max_new_tokens)
  except ValueError as e:
    raise ValueError(f'config.rewards.weights: {e}') from e
  refuse(r.group_size < 2, f'config.rl.group_size {r.group_size}: a group needs at least 2 completions to compare')
  divides('config.rl.prompts_per_step', r.prompts_per_step, 'config.rl.minibatches', r.minibatches)
  divides('config.rl.prompts_per_step', r.prompts_per_step, 'the mesh (data x fsdp x expert)', rows_over)
  divides('config.rl.microbatch_rows', r.microbatch_rows, 'the mesh (data x fsdp x expert)', rows_over)
  for section, v in (('sampling', s), ('eval', e)):
    refuse(not 0 < v.top_p <= 1, f'config.{section}.top_p {v.top_p} must be in (0, 1]')
  refuse(not 0 <= s.top_k <= model.vocab_size, f'config.sampling.top_k {s.top_k} must be in 0..{model.vocab_size}')
  length = s.max_prompt_tokens + s.max_new_tokens
  refuse(length > model.max_length,
         f'config.sampling: max_prompt_tokens + max_new_tokens is {length}, more than config.model.max_length '
         f'{model.max_length}: shorten one or raise it')
  refuse(0 < r.row_tokens < length,
         f'config.rl.row_tokens {r.row_tokens} cannot hold a sample of {length} tokens (sampling.max_prompt_tokens + '
         f'sampling.max_new_tokens): set it to {length} or more')
  if config.task.name == 'chain':
    t = config.task
    refuse(not 2 <= t.min_terms <= t.max_terms,
           f'config.task: min_terms {t.min_terms} and max_terms {t.max_terms} must satisfy 2 <= min <= max')
    refuse(t.max_total < 18, f'config.task.max_total {t.max_total}: at least 18, so that a sum always has a way to go')
  else:
    refuse(not config.task.path,
           f"config.task.path is empty: task '{config.task.name}' reads a file, give --config.task.path=FILE")
  return {'samples_per_step': r.prompts_per_step * r.group_size, 'samples': r.prompts_per_step * r.group_size * r.steps,
          'updates_per_step': r.minibatches * r.epochs, 'objective': f'{r.objective}: {objective}',
          'longest_sample_tokens': length if s.max_prompt_tokens else f'the longest prompt + {s.max_new_tokens}',
          'eval_samples': e.problems * e.samples}


def _validate_objective(r, model) -> objectives.Objective:
  choose('config.rl.objective', r.objective, tuple(objectives.OBJECTIVES))
  o = objectives.chosen(r)
  for key, options in (('advantage', objectives.ADVANTAGES), ('loss_denominator', objectives.DENOMINATORS),
                       ('kl', objectives.ESTIMATORS)):
    choose(f'config.rl.{key}', getattr(o, key), options)
  choose('config.rl.old_logp', r.old_logp, ('sampler', 'trainer'))
  choose('config.rl.importance', r.importance, objectives.IMPORTANCE)
  positive('config.rl', dataclasses.asdict(o), ('clip_low', 'clip_high'))
  for key, value in (('kl_weight', o.kl_weight), ('refill_rounds', o.refill_rounds)):
    refuse(value < 0, f'config.rl.{key} {value} must not be negative; 0 turns it off')
  refuse(r.importance != 'none' and r.old_logp != 'trainer',
         f"config.rl.importance '{r.importance}' weighs the sampler's log-probs against the trainer's: "
         "set config.rl.old_logp to 'trainer'")
  ends = tuple(r.importance_range)
  refuse(len(ends) != 2 or not 0 <= ends[0] <= 1 <= ends[1],
         f'config.rl.importance_range {ends}: give two numbers around 1, such as (0.5, 2.0)')
  refuse(r.replay_routing and not model.moe_layers,
         'config.rl.replay_routing: the model has no experts; set it to False')
  return o


def _validate_export(config, model, rows_over):
  choose('config.model.param_dtype', model.param_dtype, ('bfloat16', 'float32'))
  refuse(not config.init_from, "config.init_from is empty: name the weights to export, such as a run's workdir")
  return {'family': family(model), 'export_dtype': model.param_dtype}


def with_lengths(config, longest_prompt: int, rows_over: int = 1):
  """A copy with the lengths that were left to be derived, for a task whose longest kept prompt is `longest_prompt`
  tokens; rows_over: devices that rows are sharded over."""
  config = ml_collections.ConfigDict(config.to_dict())
  s, r = config.sampling, config.rl
  s.max_prompt_tokens = s.max_prompt_tokens or -(-longest_prompt // 8) * 8
  length = s.max_prompt_tokens + s.max_new_tokens
  r.row_tokens = r.row_tokens or max(128, -(-length // 16) * 16)
  refuse(r.row_tokens < length,
         f'config.rl.row_tokens {r.row_tokens} cannot hold a sample of {length} tokens (the longest prompt + '
         f'sampling.max_new_tokens): set it to {length} or more, or 0 to derive it')
  r.microbatch_rows = r.microbatch_rows or max(1, MICROBATCH_TOKENS // r.row_tokens) * rows_over
  return config


def eval_prompts_per_batch(config) -> int:
  """Held-out prompts sampled at once: about 512 samples, a multiple of the rollout's prompts a step."""
  unit = config.rl.prompts_per_step
  return max(1, min(512 // config.eval.samples, config.eval.problems) // unit) * unit


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
    refuse(devices % fixed, f'config.mesh: {devices} devices do not divide by {fixed} (the fixed axes of {sizes})')
    sizes[free[0]] = devices // fixed
  else:
    refuse(fixed != devices, f'config.mesh {sizes} needs {fixed} devices, there are {devices}: set one axis to -1')
  return sizes


def refuse(bad, message: str):
  """Raises ValueError with `message` if bad."""
  if bad:
    raise ValueError(message)


def choose(key: str, value: str, options: tuple[str, ...]):
  if value not in options:
    near = difflib.get_close_matches(str(value), options, 1)
    raise ValueError(f"{key} '{value}': use one of {', '.join(options)}" + (f" (nearest: '{near[0]}')" if near else ''))


def positive(section: str, values, keys: tuple[str, ...]):
  for key in keys:
    refuse(values[key] <= 0, f'{section}.{key} is {values[key]}, must be positive')


def divides(key: str, value: int, other: str, by: int):
  if value % by:
    down = value // by * by
    near = f'{down} or {down + by}' if down else f'{by}'
    refuse(True, f'{key} {value} is not a multiple of {other} {by}: set it to {near}')
