"""Rejection sampling (DeepSeek-R1, arXiv:2501.12948, sec. 2.3.3): several samples a training prompt, of which those
that are correct and readable are kept as traces to train on.

answers.jsonl has every sample, graded; traces.jsonl (and, where ArrayRecord is installed, traces.array_record, which
Grain reads at random) those that are kept, a line each: question, response (whole, with
what the prompt had opened), reference, kind, task, id, accuracy, format, language, tokens, and their source.
"""

import collections
import hashlib
import json
import time
from collections.abc import Iterable, Iterator

from moe_rl import config as configs
from moe_rl.data.problem_files import ARRAY_RECORD, DataError, array_record_module
from moe_rl.data.prompts import load_prompts
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.rl.rewards.pool import RewardPool
from moe_rl.rl.rewards.verdicts import CORRECT, VERDICTS
from moe_rl.runtime.keys import key_for
from moe_rl.runtime.provenance import code_version
from moe_rl.runtime.run import Workdir
from moe_rl.stages.collect import ANSWERS, begin, collect, described
from moe_rl.stages.sampling import AnswerFile, Judge, Sampling
from moe_rl.stages.spent import sampling_costs

REPETITION = 'repetition'
# Why a sample is left out: the first of these that holds.
REASONS = ('truncated', *(verdict for verdict in VERDICTS if verdict != CORRECT), 'format', 'language', REPETITION,
           'duplicate', 'not_chosen')
# Of several kept samples of a prompt: -> those that stay.
KEEP = {
  'all': lambda answers: answers,
  'one': lambda answers: answers[:1],
  'shortest': lambda answers: [min(answers, key=lambda answer: answer['tokens'])],
  'longest': lambda answers: [max(answers, key=lambda answer: answer['tokens'])],
}


class Sample(Sampling):
  """The stage's pieces."""

  def __init__(self, config, mesh, tokenizer=None):
    s = config.sampling
    super().__init__(config, mesh, tokenizer, 'sampling', config.sample.prompts,
                     dict(group=config.sample.samples, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p))


def fault(answer: dict, sample) -> str | None:
  """Why a sample is no trace by itself, None if it is one; sample: config.sample."""
  if not answer['stopped']:
    return 'truncated'
  if answer['verdict'] != CORRECT:
    return answer['verdict']
  if sample.well_formed and not answer['format']:
    return 'format'
  if answer['language'] < sample.min_language:
    return 'language'
  return REPETITION if answer['terms'][REPETITION] < sample.min_repetition else None


class Selection:
  """Picks traces prompt by prompt and counts: kept + sum(left_out.values()) == samples."""

  def __init__(self, sample):
    """sample: config.sample."""
    self.sample, self.samples, self.kept, self.prompts_without = sample, 0, 0, 0
    self.left_out = dict.fromkeys(REASONS, 0)
    self._seen = set()

  def __call__(self, answers: list[dict]) -> list[dict]:
    """Those of one prompt's answers that are kept; none that was kept before, of the same or an equal question."""
    faults = [fault(answer, self.sample) for answer in answers]
    fresh = []
    for answer, why in zip(answers, faults, strict=True):
      text = hashlib.sha256(json.dumps([answer['question'], answer['response']]).encode()).digest()
      if why is None and text in self._seen:
        why = 'duplicate'
      if why is None:
        self._seen.add(text)
        fresh.append(answer)
      else:
        self.left_out[why] += 1
    chosen = KEEP[self.sample.keep](fresh) if fresh else []
    self.left_out['not_chosen'] += len(fresh) - len(chosen)
    self.samples, self.kept = self.samples + len(answers), self.kept + len(chosen)
    self.prompts_without += not chosen
    return chosen


def by_prompt(answers: Iterable[dict], samples: int) -> Iterator[list[dict]]:
  """An answer file's lines, `samples` at a time."""
  group = []
  for answer in answers:
    group.append(answer)
    if len(group) == samples:
      yield group
      group = []


def write_traces(path, groups: Iterable[list[dict]], select: Selection, task: str, source: dict):
  """traces.jsonl and its copy as ArrayRecord, whole or not there; one prompt's answers are in memory at a time."""
  partial = path.with_name(path.name + '.partial')
  with partial.open('w', encoding='utf-8', newline='\n') as out:
    for group in groups:
      for a in select(group):
        trace = {key: a[key] for key in ('question', 'response', 'reference', 'kind')} | {'task': task} | {
          key: a[key] for key in ('id', 'accuracy', 'format', 'language', 'tokens')}
        out.write(json.dumps(trace | {'source': source | {'sample': a['sample']}}, ensure_ascii=False) + '\n')
  partial.replace(path)
  try:
    module = array_record_module()
  except DataError:
    return
  with path.open('rb') as lines:
    writer = module.ArrayRecordWriter(str(partial), 'group_size:1')
    for line in lines:
      writer.write(line.rstrip(b'\n'))
    writer.close()
  partial.replace(path.with_suffix(ARRAY_RECORD))


def run(config, workdir, mesh) -> dict:
  """Samples, grades and selects, from wherever the workdir is; returns (and writes) the summary."""
  prompts = load_prompts(config, load_tokenizer(config.tokenizer), ('train',))
  folder, config = Workdir(config, workdir), configs.with_lengths(config, prompts.longest)
  if summary := folder.finished():
    folder.close()
    return summary
  c = config.sample
  asked = [prompts.train[i] for i in range(len(prompts.train) if prompts.finite else c.prompts)]
  c.prompts = len(asked)
  stage, started, select = Sample(config, mesh), time.time(), Selection(c)
  weights = begin(folder, stage, prompts.notes)
  seen = collections.Counter()

  def progress(answers: list[dict]) -> str:
    seen.update(fault(answer, c) is None for answer in answers)
    return f'good {seen[True]:,} of {seen.total():,}'
  with RewardPool(config.rewards.workers, config.rewards.timeout_s, config.rewards.memory_mb) as pool:
    judge = Judge(pool, stage.tokenizer, stage.max_new, c.language, more=(REPETITION,))
    answers, whole = collect(folder, stage, weights, key_for(config.seed, 'sample', weights.checkpoint.step), judge,
                             asked, progress)
  summary = {'complete': whole, 'prompts': len(answers) // c.samples, 'samples': len(answers),
             'tokens': sum(a['tokens'] for a in answers), 'prompts_left_out': prompts.left_out,
             'seconds': time.time() - started}
  summary['costs'] = sampling_costs(config, stage, asked, answers, summary['seconds'])
  if whole:
    made = described(config, stage, weights.checkpoint, asked[0])
    if folder.main:
      groups = by_prompt(AnswerFile(folder.path / ANSWERS), c.samples)
      write_traces(folder.path / 'traces.jsonl', groups, select, config.task.name, source_of(made))
    folder.scalars(weights.checkpoint.step, {'sample/kept': select.kept, **{
      f'sample/left_out/{why}': count for why, count in select.left_out.items()}})
    summary |= {'kept': select.kept, 'left_out': select.left_out, 'prompts_without_a_trace': select.prompts_without,
                **made, **code_version()}
  folder.summary(summary)
  folder.close()
  return summary


def source_of(made: dict) -> dict:
  """What each trace says of its origin; its sample's number is added."""
  s, checkpoint = made['sampling'], made['checkpoint']
  return {'checkpoint': checkpoint['path'], 'step': checkpoint['step'], 'seed': s['seed'],
          'temperature': s['temperature'], 'top_p': s['top_p'], 'top_k': s['top_k'],
          'template': made['template']['name']}
