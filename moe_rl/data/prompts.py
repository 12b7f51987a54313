"""The prompts of an RL run: training ones for Grain, held-out ones for evaluation, and what was left out."""

import dataclasses

from moe_rl.config import chain_task
from moe_rl.data.problems import Problem, usable_problems
from moe_rl.data.tasks import Problems
from moe_rl.data.templates import opening, prompt_ids
from moe_rl.data.tokenizer import Tokenizer

ENDLESS = 2**31 - 1  # problem ids address randomness as int32


@dataclasses.dataclass(frozen=True)
class Prompt:
  """problem: what is asked; ids: the template's token ids; opening: what they already say of the answer."""

  problem: Problem
  ids: tuple[int, ...]
  opening: str = ''


@dataclasses.dataclass(frozen=True)
class Prompts:
  """train: random access, by index; held_out: a list; longest: tokens of the longest kept prompt; left_out: too-long
  ones and those without a gold answer that can be read; notes: lines for the log."""

  train: Problems
  held_out: list[Prompt]
  finite: bool
  longest: int
  left_out: int
  notes: list[str]


def load_prompts(config, tokenizer: Tokenizer) -> Prompts:
  """Prompts of config.task. A prompt longer than sampling.max_prompt_tokens (or, where that is 0, than the
  model's length leaves room for) is left out, counted and named.

  Raises ValueError if none is left, if a procedural prompt is too long, if the tokenizer lacks what config.template
  needs, or DataError for a bad file.
  """
  limit = config.sampling.max_prompt_tokens or config.model.max_length - config.sampling.max_new_tokens
  opened = opening(config.template, tokenizer)

  def prompt(problem: Problem) -> Prompt:
    return Prompt(problem, tuple(prompt_ids(config.template, tokenizer, problem.question)), opened)
  if config.task.name == 'chain':
    return _procedural(config, prompt, limit)

  t = config.task
  sources, start = [usable_problems(t.path, t.name)], 0
  train = sources[0].problems
  if t.eval_path:
    sources.append(usable_problems(t.eval_path, t.name))
    held_out = sources[1].problems[:config.eval.problems]
  else:
    start = len(train) - config.eval.problems
    if start < 1:
      raise ValueError(f'{t.path} has {len(train)} problems, not more than config.eval.problems '
                       f'{config.eval.problems}: lower it, or give config.task.eval_path')
    train, held_out = train[:start], train[start:]
  kept_train, long_train = _fitting([prompt(p) for p in train], limit)
  kept_eval, long_eval = _fitting([prompt(p) for p in held_out], limit)
  for path, kept, long in ((t.path, kept_train, long_train), (t.eval_path or t.path, kept_eval, long_eval)):
    if not kept:
      shortest = min(len(p.ids) for p in long)
      raise ValueError(f'{path}: every prompt is longer than config.sampling.max_prompt_tokens {limit} '
                       f'(the shortest has {shortest} tokens): raise it')
  notes = [f'{len(kept_train)} training and {len(kept_eval)} held-out prompts of {t.path}',
           *(note for source in sources for note in source.notes)]
  for name, long in (('training', long_train), ('held-out', long_eval)):
    if long:
      worst = max(long, key=lambda p: len(p.ids))
      notes.append(f'left out {len(long)} {name} prompts longer than config.sampling.max_prompt_tokens {limit}; '
                   f'the longest is problem {worst.problem.id} with {len(worst.ids)} tokens')
  return Prompts(Problems(kept_train.__getitem__, len(kept_train)), kept_eval, True,
                 max(len(p.ids) for p in kept_train + kept_eval),
                 len(long_train) + len(long_eval) + sum(source.left_out for source in sources), notes)


def _procedural(config, prompt, limit: int) -> Prompts:
  chain = chain_task(config)
  longest = prompt(Problem(0, '1' + '+1' * (config.task.max_terms - 1) + '=?', '', 'integer'))
  if len(longest.ids) > limit:
    raise ValueError(f'config.sampling.max_prompt_tokens {limit} is too short for config.task.max_terms '
                     f'{config.task.max_terms} (prompts of up to {len(longest.ids)} tokens): raise it')
  held_out = [prompt(chain.problem('held_out', i)) for i in range(config.eval.problems)]
  return Prompts(Problems(lambda i: prompt(chain.problem('train', i)), ENDLESS), held_out, False, len(longest.ids), 0,
                 [f'procedural {config.task.name} problems, held-out questions never among them'])


def _fitting(prompts: list[Prompt], limit: int) -> tuple[list[Prompt], list[Prompt]]:
  return [p for p in prompts if len(p.ids) <= limit], [p for p in prompts if len(p.ids) > limit]
