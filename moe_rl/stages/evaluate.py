"""Evaluation on held-out problems, several samples each: pass@1 with its standard error, pass@k, cons@n, lengths.

In a run it is a function of the answers; alone it is a stage, for any checkpoint and any one task. DeepSeek-R1
(arXiv:2501.12948) has temperature 0.6, top-p 0.95, 32,768 tokens; 64 samples for AIME and GPQA, 16 for MATH.
"""

import collections
import dataclasses
import functools
import math
import time

import numpy as np

from moe_rl import config as configs
from moe_rl.data.prompts import load_prompts
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.rl.rewards import terms
from moe_rl.rl.rewards.pool import RewardPool
from moe_rl.rl.rewards.verdicts import VERDICTS
from moe_rl.runtime.keys import key_for
from moe_rl.runtime.provenance import code_version, write_json
from moe_rl.runtime.run import Workdir
from moe_rl.stages.collect import begin, collect, described
from moe_rl.stages.sampling import Judge, Sampling, answers_of_all, in_batches
from moe_rl.stages.spent import sampling_costs

SCALARS = ('mean_tokens', 'thinking_tokens', 'format', 'language', 'truncated')


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """answers: those of `sampling.Judge`, problems outer, as many samples of each; of their text nothing is read."""

  answers: list[dict]

  @functools.cached_property
  def problems(self) -> list[list[dict]]:
    """The answers by problem."""
    samples = 1 + max(answer['sample'] for answer in self.answers)
    return [self.answers[i:i + samples] for i in range(0, len(self.answers), samples)]

  def record(self) -> dict:
    """Over all problems and, as `by_kind` and `by_level`, over those of each kind and each difficulty.

    pass@1: mean over problems of the mean over samples; its standard error over problems (n - 1); pass@k: chance that
    one of k samples is correct, from all n without bias (Chen et al., arXiv:2107.03374, eq. 1); cons@n: the answer with
    most votes is correct, the first of several. Verdicts are counted, the rest are means over samples.
    """
    by_problem, verdicts = _accuracy(self.problems).mean(1), collections.Counter(a['verdict'] for a in self.answers)
    error = float(by_problem.std(ddof=1) / np.sqrt(by_problem.size)) if by_problem.size > 1 else float('nan')
    numbers = _numbers(self.problems)
    record = {'pass@1': numbers.pop('pass@1'), 'pass@1_se': error, **numbers, 'problems': len(self.problems),
              'samples': len(self.problems[0]), 'verdicts': {verdict: verdicts[verdict] for verdict in VERDICTS}}
    for field in ('kind', 'level'):
      groups = _groups(self.problems, field)
      if groups:
        record[f'by_{field}'] = {name: {'problems': len(own), **_numbers(own)} for name, own in groups.items()}
    return record

  def __str__(self) -> str:
    r = self.record()
    return (f'pass@1 {r["pass@1"]:.3f} ± {r["pass@1_se"]:.3f}, {r["mean_tokens"]:.1f} tokens, format {r["format"]:.3f} '
            f'({r["problems"]} problems x {r["samples"]} samples)')


def _accuracy(problems: list[list[dict]]) -> np.ndarray:
  return np.array([[answer['accuracy'] for answer in answers] for answers in problems])


def _groups(problems: list[list[dict]], field: str) -> dict[str, list[list[dict]]]:
  """Problems by a field of theirs, numbers in their order; those without it are in no group."""
  groups = collections.defaultdict(list)
  for answers in problems:
    if answers[0][field]:
      groups[answers[0][field]].append(answers)
  return dict(sorted(groups.items(), key=lambda item: (len(item[0]) if item[0].isdigit() else 99, item[0])))


def _numbers(problems: list[list[dict]]) -> dict[str, float]:
  accuracy = _accuracy(problems)
  n, correct = accuracy.shape[1], accuracy.sum(1).astype(int).tolist()

  def mean(values) -> float:
    return float(np.mean([values(answer) for answers in problems for answer in answers]))
  powers = [2**i for i in range(1, n.bit_length())]
  return {
    'pass@1': float(accuracy.mean(1).mean()),
    **{f'pass@{k}': float(np.mean([pass_at(k, n, c) for c in correct])) for k in powers},
    f'cons@{n}': float(np.mean([consensus(answers) for answers in problems])),
    'mean_tokens': mean(lambda a: a['tokens']), 'thinking_tokens': mean(lambda a: a['thinking_tokens']),
    'format': mean(lambda a: a['format']), 'language': mean(lambda a: a['language']),
    'truncated': 1 - mean(lambda a: a['stopped'])}


def pass_at(k: int, n: int, correct: int) -> float:
  """The share of the k-subsets of n samples in which at least one of the correct ones is; k <= n."""
  return 1 - math.comb(n - correct, k) / math.comb(n, k)


def consensus(answers: list[dict]) -> float:
  """Accuracy of the answer that most samples agree on, of several such that which came first; 0.0 if none votes."""
  counts = collections.Counter(answer['vote'] for answer in answers if answer['vote'] is not None)
  return float(answers[min(counts, key=lambda vote: (-counts[vote], vote))]['accuracy']) if counts else 0.0


def evaluate(sample, judge: Judge, prompts: list, batch_size: int) -> Evaluation:
  """sample: (prompts) -> (Rollout, texts); prompts: the held-out ones.

  The last batch is filled up by repeating prompts, so that one program serves all; the repeats are not counted. Each
  host samples and grades its rows of a batch.
  """
  answers = []
  for batch, filled in in_batches(prompts, batch_size):
    answers += answers_of_all(judge, sample, batch, filled, texts=False)
  return Evaluation(answers)


def table(record: dict) -> str:
  """The record for people: a line for all, and one for each kind and difficulty where there are several."""
  columns = [key for key in record if key.startswith(('pass@', 'cons@')) and not key.endswith('_se')]
  columns += [*SCALARS, 'problems']
  rows = {'all': record}
  for field in ('kind', 'level'):
    groups = record.get(f'by_{field}', {})
    rows |= {f'{field} {name}': group for name, group in groups.items()} if len(groups) > 1 else {}
  width = max(map(len, rows))

  def shown(value) -> str:
    return f'{value:,}' if isinstance(value, int) else f'{value:.3f}' if value < 10 else f'{value:,.1f}'
  lines = [' ' * width + ''.join(f'  {column:>11}' for column in columns)]
  lines += [f'{name:<{width}}' + ''.join(f'  {shown(row[c]):>{max(11, len(c))}}' for c in columns)
            for name, row in rows.items()]
  counts = ', '.join(f'{verdict} {count:,}' for verdict, count in record['verdicts'].items() if count)
  return '\n'.join([*lines, f'pass@1 ± {record["pass@1_se"]:.3f} over problems; verdicts: {counts}'])


# The stage.


class Evaluate(Sampling):
  """The stage's pieces. Its program is the one by which RL evaluates, if the settings are the same."""

  def __init__(self, config, mesh, tokenizer=None):
    e = config.eval
    super().__init__(config, mesh, tokenizer, 'evaluation', e.problems,
                     dict(group=e.samples, temperature=e.temperature, top_p=e.top_p))


def run(config, workdir, mesh) -> dict:
  """Evaluates config.init_from on the whole task, from wherever the workdir is; returns (and writes) the summary."""
  prompts = load_prompts(config, load_tokenizer(config.tokenizer), ('held_out',))
  folder, config = Workdir(config, workdir), configs.with_lengths(config, prompts.longest)
  if summary := folder.finished():
    folder.close()
    return summary
  config.eval.problems = len(prompts.held_out)  # as many as there are, and no more in a batch
  stage, started = Evaluate(config, mesh), time.time()
  weights = begin(folder, stage, prompts.notes)
  right = []

  def progress(answers: list[dict]) -> str:
    right.extend(answer['accuracy'] for answer in answers)
    return f'pass@1 {np.mean(right):.3f}'
  with RewardPool(config.rewards.workers, config.rewards.timeout_s, config.rewards.memory_mb) as pool:
    judge = Judge(pool, stage.tokenizer, stage.max_new, config.eval.language, terms.parse(config.rewards.weights))
    answers, whole = collect(folder, stage, weights, key_for(config.seed, 'eval', weights.checkpoint.step), judge,
                             prompts.held_out, progress)
  summary = {'complete': whole, 'answers': len(answers), 'tokens': sum(a['tokens'] for a in answers),
             'prompts_left_out': prompts.left_out, 'seconds': time.time() - started}
  summary['costs'] = sampling_costs(config, stage, prompts.held_out, answers, summary['seconds'])
  if whole:
    record = Evaluation(answers).record()
    if folder.main:
      write_json(folder.path / 'evaluation.json', {
        **record, **described(config, stage, weights.checkpoint, prompts.held_out[0]), **code_version()})
    folder.evaluation(weights.checkpoint.step, record)
    print(table(record), flush=True)
    summary |= {'step': weights.checkpoint.step, **record}
  folder.summary(summary)
  folder.close()
  return summary
