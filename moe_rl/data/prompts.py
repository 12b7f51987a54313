"""The prompts of a run: training ones for Grain, held-out ones for evaluation, and what was left out."""

import dataclasses
import os
import pathlib

from moe_rl.config import chain_task, general_per_step
from moe_rl.data import decontaminate
from moe_rl.data.problem_files import parse_records, text_field
from moe_rl.data.problems import Problem, usable_problems
from moe_rl.data.tasks import Problems
from moe_rl.data.templates import opening, prompt_ids
from moe_rl.data.tokenizer import Tokenizer

GENERAL_IDS = 2**30  # general prompts have ids from here on, so that they share no address with the task's
ENDLESS = 2**31 - 1  # problem ids address randomness as int32
SPLITS = ('train', 'held_out')
WORDS = {'train': 'training', 'held_out': 'held-out'}


@dataclasses.dataclass(frozen=True)
class Prompt:
  """problem: what is asked; ids: the template's token ids; opening: what they already say of the answer."""

  problem: Problem
  ids: tuple[int, ...]
  opening: str = ''


@dataclasses.dataclass(frozen=True)
class Prompts:
  """train: random access, by index; held_out: a list; longest: tokens of the longest kept prompt; left_out: too-long
  ones, those without a gold answer that can be read, and those that an evaluation file has too; notes: lines for the
  log."""

  train: Problems
  held_out: list[Prompt]
  finite: bool
  longest: int
  left_out: int
  notes: list[str]


def load_prompts(config, tokenizer: Tokenizer, splits: tuple[str, ...] = SPLITS) -> Prompts:
  """Prompts of config.task, of the splits that are wanted; the other one is empty. A prompt longer than
  sampling.max_prompt_tokens (or, where that is 0, than the model's length leaves room for) is left out, counted and
  named, and so is a training problem that task.decontaminate's files have too.

  A file that is read for one split alone is taken whole, up to config.eval.problems or config.sample.prompts.
  Raises ValueError if none is left, if a procedural prompt is too long, if the tokenizer lacks what config.template
  needs, or DataError for a bad file.
  """
  limit = prompt_limit(config)
  opened = opening(config.template, tokenizer)

  def prompt(problem: Problem) -> Prompt:
    return Prompt(problem, tuple(prompt_ids(config.template, tokenizer, problem.question)), opened)
  if config.task.name == 'chain':
    return _procedural(config, prompt, limit, splits)

  source, kept, long = _read(config, splits), {}, {}
  for split in splits:
    kept[split], long[split] = _fitting([prompt(p) for p in source.problems[split]], limit)
    if not kept[split]:
      shortest = min(len(p.ids) for p in long[split])
      raise ValueError(f'{source.paths[split]}: every prompt is longer than config.sampling.max_prompt_tokens {limit} '
                       f'(the shortest has {shortest} tokens): raise it')
  counts = ' and '.join(f'{len(kept[split])} {WORDS[split]}' for split in splits)
  notes = [f'{counts} prompts of {source.paths[splits[0]]}', *source.notes]
  for split in splits:
    if long[split]:
      worst = max(long[split], key=lambda p: len(p.ids))
      notes.append(f'left out {len(long[split])} {WORDS[split]} prompts longer than config.sampling.max_prompt_tokens '
                   f'{limit}; the longest is problem {worst.problem.id} with {len(worst.ids)} tokens')
  train = kept.get('train', [])
  return Prompts(Problems(train.__getitem__, len(train)), kept.get('held_out', []), True,
                 max(len(p.ids) for prompts in kept.values() for p in prompts),
                 sum(map(len, long.values())) + source.left_out, notes)


@dataclasses.dataclass(frozen=True)
class _Source:
  """Problems and path of the file by split; left_out: without a readable gold answer, or known to the evaluation."""

  problems: dict[str, list[Problem]]
  paths: dict[str, str]
  left_out: int
  notes: list[str]


def _read(config, splits: tuple[str, ...]) -> _Source:
  t = config.task
  paths = {'train': t.path, 'held_out': t.get('eval_path') or t.path}
  files = {path: usable_problems(path, t.name) for path in dict.fromkeys(paths[split] for split in splits)}
  problems = {split: files[paths[split]].problems for split in splits}
  notes, left_out = [note for file in files.values() for note in file.notes], sum(f.left_out for f in files.values())
  if 'held_out' in splits and 'train' in splits and not t.eval_path:
    start = len(problems['train']) - config.eval.problems
    if start < 1:
      raise ValueError(f'{t.path} has {len(problems["train"])} problems, not more than config.eval.problems '
                       f'{config.eval.problems}: lower it, or give config.task.eval_path')
    problems = {'train': problems['train'][:start], 'held_out': problems['train'][start:]}
  elif 'held_out' in splits:
    problems['held_out'] = problems['held_out'][:config.eval.problems or None]
  if 'train' in splits and t.decontaminate:
    problems['train'], removed = _decontaminated(t, problems['train'])
    notes, left_out = notes + decontaminate.notes(removed), left_out + len(removed)
  if 'sample' in config:
    problems['train'] = problems['train'][:config.sample.prompts or None]
  return _Source(problems, paths, left_out, notes)


def _decontaminated(task, problems: list[Problem]) -> tuple[list[Problem], list]:
  """(those that overlap with no question of task.decontaminate, what was removed and why)."""
  overlaps = decontaminate.overlaps_with(decontaminate.files(task.decontaminate))
  places = [overlaps.of(problem.question) for problem in problems]
  kept = [problem for problem, found in zip(problems, places, strict=True) if not found]
  if not kept:
    raise ValueError(f'{task.path}: every problem overlaps with config.task.decontaminate {task.decontaminate}: is it '
                     'the same file?')
  return kept, [(f'problem {p.id}', found) for p, found in zip(problems, places, strict=True) if found]


def _procedural(config, prompt, limit: int, splits: tuple[str, ...]) -> Prompts:
  chain = chain_task(config)
  longest = prompt(Problem(0, '1' + '+1' * (config.task.max_terms - 1) + '=?', '', 'integer'))
  if len(longest.ids) > limit:
    raise ValueError(f'config.sampling.max_prompt_tokens {limit} is too short for config.task.max_terms '
                     f'{config.task.max_terms} (prompts of up to {len(longest.ids)} tokens): raise it')
  held_out = [prompt(chain.problem('held_out', i)) for i in range(config.eval.problems if 'held_out' in splits else 0)]
  return Prompts(Problems(lambda i: prompt(chain.problem('train', i)), ENDLESS), held_out, False, len(longest.ids), 0,
                 [f'procedural {config.task.name} problems, held-out questions never among them'])


@dataclasses.dataclass(frozen=True)
class General:
  """Prompts without a reference, of kind 'open'. longest: tokens of the longest one; left_out: too long ones; notes:
  lines for the log."""

  prompts: list[Prompt]
  longest: int = 0
  left_out: int = 0
  notes: tuple[str, ...] = ()


def load_general(config, tokenizer: Tokenizer) -> General:
  """Prompts of config.task.general_path: JSON lines with `question`; none where that is ''.

  Raises DataError for a bad file, ValueError if too few are left for a step.
  """
  if not config.task.general_path:
    return General([])
  path = pathlib.Path(os.path.expanduser(config.task.general_path))
  limit, opened = prompt_limit(config), opening(config.template, tokenizer)
  questions = parse_records(path, lambda record: text_field(record.value, 'question'))
  asked = [Problem(GENERAL_IDS + i, question, '', 'open') for i, question in enumerate(questions)]
  kept, long = _fitting([Prompt(p, tuple(prompt_ids(config.template, tokenizer, p.question)), opened) for p in asked],
                        limit)
  needed = general_per_step(config)
  if len(kept) < needed:
    raise ValueError(f'{path}: {len(kept)} general prompts of up to {limit} tokens, and a step takes {needed} '
                     '(config.rl.general_share of config.rl.prompts_per_step): add prompts, or lower the share')
  notes = [f'{len(kept)} general prompts of {path}, {needed} a step from step {config.rl.general_from} on']
  if long:
    notes.append(f'left out {len(long)} general prompts longer than {limit} tokens')
  return General(kept, max(len(p.ids) for p in kept), len(long), tuple(notes))


def prompt_limit(config) -> int:
  """Tokens that a prompt may have."""
  return config.sampling.max_prompt_tokens or config.model.max_length - config.sampling.max_new_tokens


def _fitting(prompts: list[Prompt], limit: int) -> tuple[list[Prompt], list[Prompt]]:
  return [p for p in prompts if len(p.ids) <= limit], [p for p in prompts if len(p.ids) > limit]
