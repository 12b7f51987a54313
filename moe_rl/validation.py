"""The check of an experiment's config before any compile: sizes against each other, names against what there is.

Every refusal names the key, its value and the remedy. Touches no device and reads no data.
"""

import dataclasses
import math

from moe_rl.config import STAGES, corpus_mix, general_per_step, mesh_sizes, model_config
from moe_rl.data.preferences import KINDS as REWARD_KINDS
from moe_rl.data.problem_formats import FORMATS
from moe_rl.data.templates import NAMES as TEMPLATES
from moe_rl.data.traces import parse_sources
from moe_rl.models.config import ModelConfig
from moe_rl.models.heads import DIVERGENCES
from moe_rl.models.hf_config import family
from moe_rl.refusals import choose, divides, positive, refuse
from moe_rl.rl import objectives
from moe_rl.rl.rewards import language, terms
from moe_rl.runtime import mesh as meshes


def validate(config, devices: int, vocab_size: int, processes: int = 1) -> dict[str, int | float | str]:
  """Checks sizes against each other and returns the derived ones, to be printed. Touches no device, reads no data.

  devices: how many there are, of all processes; vocab_size: the tokenizer's. Raises ValueError: the key, its value, the
  remedy.
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
  check = {'pretrain': _validate_pretrain, 'sft': _validate_sft, 'rl': _validate_rl, 'evaluate': _validate_evaluate,
           'sample': _validate_sample, 'reward_model': _validate_reward_model,
           'general_data': _validate_general_data, 'export': _validate_export}[config.stage]
  refuse((model.head == 'scalar') != (config.stage == 'reward_model'),
         f"config.model.head '{model.head}' is not that of config.stage '{config.stage}': a reward model has 'scalar', "
         "all others 'vocabulary'")
  mesh = ' x '.join(f'{k}={v}' for k, v in sizes.items())
  derived = check(config, model, rows_over)
  check_hosts(config, rows_over, processes)
  return {'devices': devices, **({'processes': processes} if processes > 1 else {}), 'mesh': mesh, **derived}


def check_hosts(config, rows_over: int, processes: int):
  """Raises ValueError unless each process can have the same whole number of a batch's rows."""
  refuse(rows_over % processes,
         f'config.mesh: data x fsdp x expert is {rows_over}, over which rows are split; with {processes} processes it '
         f'must be a multiple of {processes}, so that each has rows of its own: raise one of them')
  if config.stage == 'rl':
    r = config.rl
    if r.group_size % r.minibatches:  # else a minibatch may have samples of every prompt
      divides('config.rl.prompts_per_step', r.prompts_per_step, f'{processes} processes x config.rl.minibatches:',
              processes * r.minibatches)
    divides('config.rl.prompts_per_step', r.prompts_per_step, 'the processes:', processes)
    refuse(general_per_step(config) % processes,
           f'config.rl.general_share {r.general_share} of config.rl.prompts_per_step {r.prompts_per_step} is '
           f'{general_per_step(config)} prompts, which do not divide over {processes} processes: set it to a multiple '
           f'of {processes / r.prompts_per_step:g}')


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
  cut = [(logical, what, getattr(model, what)) for logical, what in (
    ('embed', 'width'), ('experts', 'experts'), ('expert_rows', 'expert_ff'), ('head_work', 'heads'),
    ('mlp', 'dense_ff'), ('vocab', 'vocab_size'))]
  columns = {'heads x qk_dim': model.heads * model.qk_dim, 'heads x v_dim': model.heads * model.v_dim}
  if model.attention == 'gqa':
    columns = {'kv_heads x head_dim': model.kv_heads * model.head_dim}
  for logical, what, count in [*cut, *(('heads', what, count) for what, count in columns.items())]:
    where, axes = over(logical)
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


def _validate_sft(config, model, rows_over):
  s = config.sft
  refuse(not s.path, 'config.sft.path is empty: name the traces, --config.sft.path=FILE (JSON lines with question and '
                     'response; several files as FILE,FILE; FILE@N for the first N)')
  parse_sources(s.path)
  positive('config.sft', s, ('epochs', 'rows_per_step'))
  for key in ('row_tokens', 'microbatch_rows'):
    refuse(s[key] < 0, f'config.sft.{key} {s[key]}: must be positive, or 0 to derive it')
  divides('config.sft.rows_per_step', s.rows_per_step, 'the mesh (data x fsdp x expert)', rows_over)
  if s.microbatch_rows:
    divides('config.sft.rows_per_step', s.rows_per_step, 'config.sft.microbatch_rows', s.microbatch_rows)
    divides('config.sft.microbatch_rows', s.microbatch_rows, 'the mesh (data x fsdp x expert)', rows_over)
  refuse(s.balance_weight < 0, f'config.sft.balance_weight {s.balance_weight} must not be negative; 0 turns it off')
  choose('config.sft.divergence', s.divergence, DIVERGENCES)
  refuse(not 0 <= s.teacher_weight <= 1, f'config.sft.teacher_weight {s.teacher_weight} must be in 0..1')
  loss = 'cross-entropy, mean over the response tokens of a step'
  if s.teacher:
    loss = f'{1 - s.teacher_weight:g} {loss}, + {s.teacher_weight:g} {s.divergence} KL to {s.teacher}'
  return {'loss': loss, 'steps': 'as the traces give'}


def _validate_rl(config, model, rows_over):
  r, s, e = config.rl, config.sampling, config.eval
  positive('config.rl', r, ('steps', 'prompts_per_step', 'minibatches', 'epochs'))
  for key, value in (('rl.row_tokens', r.row_tokens), ('rl.microbatch_rows', r.microbatch_rows)):
    refuse(value < 0, f'config.{key} {value}: must be positive, or 0 to derive it')
  _validate_answers(config, model)
  _validate_distribution('sampling', s, model)
  _validate_eval(config, model)
  positive('config.eval', e, ('problems',))
  objective = _validate_objective(r, model)
  choose('config.rl.reference_memory', r.reference_memory, meshes.MEMORIES)
  _validate_general(config)
  refuse(r.group_size < 2, f'config.rl.group_size {r.group_size}: a group needs at least 2 completions to compare')
  divides('config.rl.prompts_per_step', r.prompts_per_step, 'config.rl.minibatches', r.minibatches)
  divides('config.rl.prompts_per_step', r.prompts_per_step, 'the mesh (data x fsdp x expert)', rows_over)
  divides('config.rl.microbatch_rows', r.microbatch_rows, 'the mesh (data x fsdp x expert)', rows_over)
  length = s.max_prompt_tokens + s.max_new_tokens
  refuse(0 < r.row_tokens < length,
         f'config.rl.row_tokens {r.row_tokens} cannot hold a sample of {length} tokens (sampling.max_prompt_tokens + '
         f'sampling.max_new_tokens): set it to {length} or more')
  return {'samples_per_step': r.prompts_per_step * r.group_size, 'samples': r.prompts_per_step * r.group_size * r.steps,
          'updates_per_step': r.minibatches * r.epochs, 'objective': f'{r.objective}: {objective}',
          'longest_sample_tokens': _longest(s),
          'eval_samples': e.problems * e.samples}


def _validate_answers(config, model):
  """What every stage has that samples and grades: lengths, workers, terms, the task."""
  s, w = config.sampling, config.rewards
  positive('config.sampling', s, ('max_new_tokens', *(['batch_samples'] if 'batch_samples' in s else [])))
  refuse(s.max_prompt_tokens < 0,
         f'config.sampling.max_prompt_tokens {s.max_prompt_tokens}: must be positive, or 0 to derive it')
  length = s.max_prompt_tokens + s.max_new_tokens
  refuse(length > model.max_length,
         f'config.sampling: max_prompt_tokens + max_new_tokens is {length}, more than config.model.max_length '
         f'{model.max_length}: shorten one or raise it')
  positive('config.rewards', w, ('timeout_s', 'workers'))
  refuse(w.memory_mb < 128,
         f'config.rewards.memory_mb {w.memory_mb} is too small for a worker (70 at rest): set 512 or more')
  if 'weights' in w:
    try:
      weighted = terms.validate(w.weights, s.max_new_tokens)
    except ValueError as e:
      raise ValueError(f'config.rewards.weights: {e}') from e
    refuse('model' not in w and terms.MODEL in [term.name for term in weighted],
           'config.rewards.weights: the term `model` is computed in RL alone: leave it out here')
  t = config.task
  choose('config.task.name', t.name, ('chain', *FORMATS))
  if t.name == 'chain':
    refuse(not 2 <= t.min_terms <= t.max_terms,
           f'config.task: min_terms {t.min_terms} and max_terms {t.max_terms} must satisfy 2 <= min <= max')
    refuse(t.max_total < 18, f'config.task.max_total {t.max_total}: at least 18, so that a sum always has a way to go')
    refuse(t.get('decontaminate'), "config.task.decontaminate: the problems of 'chain' are none of any file, and its "
           'held-out ones are apart by themselves: leave it empty')
  else:
    refuse(not t.path and not (config.stage == 'evaluate' and t.eval_path),
           f"config.task.path is empty: task '{t.name}' reads a file, give --config.task.path=FILE")


def _validate_distribution(section, s, model):
  positive(f'config.{section}', s, ('temperature',))
  refuse(not 0 < s.top_p <= 1, f'config.{section}.top_p {s.top_p} must be in (0, 1]')
  top_k = s.get('top_k', 0)
  refuse(not 0 <= top_k <= model.vocab_size, f'config.{section}.top_k {top_k} must be in 0..{model.vocab_size}')


def _validate_eval(config, model):
  e = config.eval
  positive('config.eval', e, ('samples',))
  _validate_distribution('eval', e, model)
  _validate_language('eval', e.language)


def _validate_language(section: str, code: str):
  if code:
    try:
      language.check_target(code)
    except ValueError as e:
      raise ValueError(f'config.{section}.language: {e}') from e


def _validate_start(config, what: str):
  refuse(not config.init_from, f"config.init_from is empty: name the weights to {what}: a Hugging Face folder, a run's "
                               "workdir, a .safetensors file of ours, or 'embedded'")


def _validate_evaluate(config, model, rows_over):
  s, e = config.sampling, config.eval
  _validate_start(config, 'evaluate')
  _validate_answers(config, model)
  _validate_eval(config, model)
  refuse(e.problems < 0 or (config.task.name == 'chain' and not e.problems),
         f'config.eval.problems {e.problems}: give how many' + (
           " (the task 'chain' has no end)" if config.task.name == 'chain' else ', or 0 for all of the file'))
  return {'samples_per_problem': e.samples, 'samples': e.problems * e.samples or 'all problems of the file',
          'longest_sample_tokens': _longest(s)}


def _validate_sample(config, model, rows_over):
  s, c = config.sampling, config.sample
  _validate_start(config, 'sample from')
  _validate_answers(config, model)
  _validate_distribution('sampling', s, model)
  _validate_language('sample', c.language)
  positive('config.sample', c, ('samples',))
  choose('config.sample.keep', c.keep, ('all', 'one', 'shortest', 'longest'))
  refuse(not 0 <= c.min_language <= 1, f'config.sample.min_language {c.min_language} must be in 0..1')
  refuse(not -1 <= c.min_repetition <= 0, f'config.sample.min_repetition {c.min_repetition} must be in -1..0')
  refuse(c.prompts < 0 or (config.task.name == 'chain' and not c.prompts),
         f'config.sample.prompts {c.prompts}: give how many' + (
           " (the task 'chain' has no end)" if config.task.name == 'chain' else ', or 0 for all of the file'))
  return {'samples_per_prompt': c.samples, 'samples': c.prompts * c.samples or 'all problems of the file',
          'longest_sample_tokens': _longest(s)}


def _longest(sampling) -> int | str:
  p, new = sampling.max_prompt_tokens, sampling.max_new_tokens
  return p + new if p else f'the longest prompt + {new}'


def _validate_general(config):
  t, r, path = config.task, config.rl, config.rewards.model
  judged = terms.MODEL in [term.name for term in terms.parse(config.rewards.weights)]
  refuse(judged and not path,
         'config.rewards.weights has the term `model`, the number of a reward model: name one with '
         '--config.rewards.model=WORKDIR (a run of the stage reward_model), or leave the term out')
  refuse(path and not judged, f"config.rewards.model '{path}' is given and weighs nothing: add such as model=1 to "
                              'config.rewards.weights')
  refuse(judged and not t.general_path and t.name != 'jsonl',
         'config.rewards.weights has the term `model`, which is about general prompts, and there are none: give '
         '--config.task.general_path=FILE (JSON lines with `question`)')
  refuse(not 0 <= r.general_share < 1, f'config.rl.general_share {r.general_share} must be in [0, 1)')
  refuse(r.general_from < 0, f'config.rl.general_from {r.general_from} must not be negative')
  refuse(bool(t.general_path) != bool(r.general_share),
         f"config.task.general_path '{t.general_path}' and config.rl.general_share {r.general_share} belong together: "
         'give both, such as a share of 0.25, or neither')
  refuse(t.general_path and not 0 < general_per_step(config) < r.prompts_per_step,
         f'config.rl.general_share {r.general_share} of config.rl.prompts_per_step {r.prompts_per_step} is '
         f'{general_per_step(config)} prompts: there must be some of either kind')


def _validate_general_data(config, model, rows_over):
  c = config.general_data
  positive('config.general_data', c, ('traces', 'pairs', 'prompts'))
  return {'lines': c.traces + c.pairs + c.prompts}


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


def _validate_reward_model(config, model, rows_over):
  c = config.reward_model
  choose('config.reward_model.kind', c.kind, REWARD_KINDS)
  positive('config.reward_model', c, ('held_out', 'epochs', 'examples_per_step'))
  fields = 'question, chosen, rejected' if c.kind == 'helpfulness' else 'question, response, safe'
  refuse(not c.path, f'config.reward_model.path is empty: give JSON lines with {fields} as '
                     '--config.reward_model.path=FILE')
  for key in ('row_tokens', 'microbatch_rows', 'eval_every'):
    refuse(c[key] < 0, f'config.reward_model.{key} {c[key]} must not be negative')
  divides('config.reward_model.microbatch_rows', c.microbatch_rows, 'the mesh (data x fsdp x expert)', rows_over)
  refuse(c.row_tokens > model.max_length * 2,
         f'config.reward_model.row_tokens {c.row_tokens} is more than two answers of config.model.max_length '
         f'{model.max_length} fill: lower it')
  return {'kind': c.kind, 'examples_per_step': c.examples_per_step}


def _validate_export(config, model, rows_over):
  choose('config.model.param_dtype', model.param_dtype, ('bfloat16', 'float32'))
  refuse(not config.init_from, "config.init_from is empty: name the weights to export, such as a run's workdir")
  return {'family': family(model), 'export_dtype': model.param_dtype}
