"""What RL, evaluation and rejection sampling share: the jitted sampler, graded answers, the file that keeps them."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_rl import config as configs
from moe_rl.data.prompts import Prompt
from moe_rl.data.templates import TAGS
from moe_rl.data.tokenizer import Tokenizer, load_tokenizer
from moe_rl.models.checkpoints import Checkpoint
from moe_rl.models.config import ModelConfig
from moe_rl.models.hf_import import load_variables
from moe_rl.models.transformer import Transformer
from moe_rl.rl.rewards import functions, terms, text_terms
from moe_rl.rl.rewards.pool import Grade, Item, RewardPool
from moe_rl.rl.rewards.votes import Ballot, votes
from moe_rl.rl.sampler import Rollout, make_sampler
from moe_rl.runtime import hosts
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.programs import Program
from moe_rl.runtime.state import sampler_variables
from moe_rl.stages.start import open_for

THINK, THINK_END = TAGS[:2]
TEXTS = ('question', 'reference', 'response', 'answer')  # of an answer: what may be long


def jit_sampler(model: ModelConfig, mesh, placed, max_new: int, eos_ids: tuple[int, ...], **kwargs):
  """The sampler on a mesh, jitted; placed: shardings of the weights; kwargs: as `make_sampler` takes them.

  Devices that are `mesh.alone` sample their own prompts and stop by themselves: there a partitioner gathers the rows of
  every sort.
  """
  by_row, whole, alone = meshes.rows(mesh), meshes.everywhere(mesh), meshes.alone(mesh, placed)
  layout = None if alone else meshes.Layout(mesh, 'sampling')
  sample = make_sampler(Transformer(model, layout), max_new=max_new, eos_id=eos_ids, **kwargs)
  if alone:
    sample = jax.shard_map(sample, mesh=mesh, in_specs=(P(), *[by_row.spec] * 3, P()), out_specs=by_row.spec,
                           check_vma=False)
  return jax.jit(sample, in_shardings=(placed, by_row, by_row, by_row, whole), out_shardings=by_row)


def sampler_arguments(variables, mesh, prompts: int, max_prompt_tokens: int) -> tuple:
  """What the sampler takes, abstract."""
  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=meshes.rows(mesh))
  return (variables, array(prompts, max_prompt_tokens), array(prompts), array(prompts),
          jax.eval_shape(lambda: jax.random.key(0)))


def sample_prompts(run_sampler, state, tokenizer, prompts, width: int, key) -> tuple[Rollout, list[list[str]]]:
  """Samples for this host's `Prompt`s; the rollout as numpy arrays and the answers' texts by prompt.

  state: has the weights as `variables`.
  """
  ids = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    row[:len(prompt.ids)] = prompt.ids
  lengths = np.array([len(p.ids) for p in prompts], np.int32)
  addresses = np.array([p.problem.id for p in prompts], np.int32)
  rollout = hosts.own_rows(run_sampler(state.variables, *hosts.spread([ids, lengths, addresses], state.variables), key))
  texts = [[p.opening + tokenizer.decode(r[:n]) for r, n in zip(rs, ns, strict=True)]
           for p, rs, ns in zip(prompts, rollout.response_BxGxS, rollout.length_BxG, strict=True)]
  return rollout, texts


def grade(pool: RewardPool, prompts, texts, weighted: tuple[terms.Term, ...] = (),
          more: tuple[str, ...] = ()) -> list[Grade]:
  """Grades in order, prompts outer, samples inner; with the scores of those weighted terms that read the text, and then
  of `more` such terms by their keys."""
  def item(problem, text) -> Item:
    worked = terms.for_workers(weighted, problem.question)
    return Item(problem.kind, text, problem.reference,
                (*worked, *(text_terms.resolve(key, problem.question) for key in more)))
  return pool.grade([item(p.problem, t) for p, ts in zip(prompts, texts, strict=True) for t in ts])


# Stages that only sample.


@dataclasses.dataclass(frozen=True)
class Weights:
  """variables: {'params', 'router'} as the sampler reads them; checkpoint: where they are from."""

  variables: dict
  checkpoint: Checkpoint


class Sampling:
  """A stage that samples and trains nothing: model, tokenizer and the jitted sampler, made once.

  config: with its lengths known (`config.with_lengths`); settings: of the sampler: group, temperature, top_k, top_p;
  prompts: how many there are, 0 if that is not known yet; name: of the program.
  """

  def __init__(self, config, mesh, tokenizer, name: str, prompts: int, settings: dict):
    self.config, self.mesh, self.name, self.settings = config, mesh, name, settings
    self.model = dataclasses.replace(configs.model_config(config), mtp_layers=0)  # it plays no part in sampling
    self.tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    self.width, self.max_new = config.sampling.max_prompt_tokens, config.sampling.max_new_tokens
    self.prompts_per_batch = configs.prompts_per_batch(
      config.sampling.batch_samples, settings['group'], prompts, meshes.rows_over(mesh.shape))
    self.abstract = sampler_variables(self.model, mesh)
    self.sampler = jit_sampler(self.model, mesh, jax.tree.map(lambda x: x.sharding, self.abstract), self.max_new,
                               self.tokenizer.eos_ids, **settings)

  def programs(self) -> list[Program]:
    return [Program(self.name, self.sampler,
                    sampler_arguments(self.abstract, self.mesh, self.prompts_per_batch, self.width))]

  def load(self) -> Weights:
    """The weights of config.init_from, straight to where the sampler reads them. Raises ValueError as `open_for`."""
    checkpoint = open_for(self.config.init_from, self.model)
    return Weights(load_variables(checkpoint, self.model, self.abstract), checkpoint)

  def sample(self, weights: Weights, key, prompts: list[Prompt]) -> tuple[Rollout, list[list[str]]]:
    return sample_prompts(self.sampler, weights, self.tokenizer, prompts, self.width, key)


def in_batches(prompts: list[Prompt], size: int) -> Iterator[tuple[list[Prompt], list[Prompt]]]:
  """(prompts, the same filled up to `size` by repeating the first, so that one program serves all)."""
  for start in range(0, len(prompts), size):
    batch = prompts[start:start + size]
    yield batch, batch + [batch[0]] * (size - len(batch))


# Answers.


@dataclasses.dataclass(frozen=True)
class Judge:
  """From a batch's samples to its answers, a dict each, prompts outer, samples inner:

  id, sample: the problem's and the sample's numbers, which with seed and purpose address its randomness; question,
  reference, kind, level: of the problem; response: text, with what the prompt had opened; answer: extracted from it, or
  None; verdict; vote: the number of the first sample with an equal answer, None if it does not vote; accuracy, format,
  language: scores; terms, reward: those that are weighted, and their sum; tokens, thinking_tokens; stopped: not cut.

  language: a target such as 'en', '' for the question's; more: further terms of text, whose scores go into `terms`.
  """

  pool: RewardPool
  tokenizer: Tokenizer
  max_new: int
  language: str = ''
  weighted: tuple[terms.Term, ...] = ()
  more: tuple[str, ...] = ()

  def __call__(self, prompts: list[Prompt], rollout: Rollout, texts: list[list[str]]) -> list[dict]:
    """rollout, texts: of at least these prompts, the rest being filling."""
    count = len(prompts)
    texts, lengths, samples = texts[:count], rollout.length_BxG[:count], rollout.length_BxG.shape[1]
    asked = (f'language:{self.language}' if self.language else 'language', *self.more)
    grades = grade(self.pool, prompts, texts, self.weighted, asked)
    extracted = [functions.ACCURACY[p.problem.kind].extract(t)
                 for p, ts in zip(prompts, texts, strict=True) for t in ts]
    elected = votes(self.pool, [
      Ballot(p.problem.kind, p.problem.reference, extracted[i:i + samples], [g.verdict for g in grades[i:i + samples]])
      for p, i in zip(prompts, range(0, len(grades), samples), strict=True)])
    scores = self._scores(grades, lengths, asked)
    out = []
    for row, prompt in enumerate(prompts):
      for n, text in enumerate(texts[row]):
        i, length = row * samples + n, int(lengths[row, n])
        p, g = prompt.problem, grades[i]
        out.append({
          'id': p.id, 'sample': n, 'question': p.question, 'reference': p.reference, 'kind': p.kind, 'level': p.level,
          'response': text, 'answer': extracted[i], 'verdict': g.verdict, 'vote': elected[row][n],
          'accuracy': g.accuracy, 'format': g.format, 'language': g.scores[-len(asked)],
          **scores[i], 'tokens': length,
          'thinking_tokens': thinking_tokens(self.tokenizer, rollout.response_BxGxS[row, n, :length], text,
                                             prompt.opening),
          'stopped': bool(rollout.stopped_BxG[row, n])})
    return out

  def _scores(self, grades: list[Grade], lengths: np.ndarray, asked: tuple[str, ...]) -> list[dict]:
    """'terms' and, where terms are weighted, 'reward' of each answer."""
    named, reward = {key: [g.scores[i - len(asked)] for g in grades] for i, key in enumerate(asked) if i}, []
    if self.weighted:
      found = terms.rewards(self.weighted, grades, lengths, self.max_new)
      named |= {key: values.reshape(-1).tolist() for key, values in found.scores.items()}
      reward = [{'reward': value} for value in found.reward.reshape(-1).tolist()]
    scores = [{'terms': dict(zip(named, values, strict=True))} for values in zip(*named.values(), strict=True)]
    return [score | value for score, value in zip(scores or [{}] * len(grades), reward or [{}] * len(grades),
                                                  strict=True)]


def answers_of_all(judge: Judge, sample: Callable, batch: list[Prompt], filled: list[Prompt],
                   texts: bool = True) -> list[dict]:
  """The answers to a batch, of which each host samples and grades its rows.

  sample: (prompts=this host's) -> (Rollout, texts); filled: the batch as `in_batches` fills it up; texts: whether
  several hosts tell each other `TEXTS` too.
  """
  own = judge(hosts.mine(batch), *sample(prompts=hosts.mine(filled)))
  if hosts.count() == 1:
    return own
  told = [answer if texts else without_texts(answer) for answer in own]
  samples = len(told) // max(len(hosts.mine(batch)), 1)
  by_prompt = hosts.merge([told[i:i + samples] for i in range(0, len(told), samples or 1)])
  return [answer for answers in by_prompt for answer in answers]


def without_texts(answer: dict) -> dict:
  return {name: value for name, value in answer.items() if name not in TEXTS}


def thinking_tokens(tokenizer: Tokenizer, ids: np.ndarray, text: str, opening: str) -> int:
  """Tokens before the last `</think>`; all, if thinking began and never ended; 0 without thinking.

  ids: of the response; text: what they say, after `opening`, which the prompt has said. Where the tag is no single id
  of the response, the text before it is encoded.
  """
  if THINK_END not in text:
    return len(ids) if THINK in text else 0
  tag = tokenizer.encode(THINK_END, allow=TAGS)
  places = np.flatnonzero(ids == tag[0]) if len(tag) == 1 else ()
  if len(places):
    return int(places[-1])
  return len(tokenizer.encode(text[len(opening):text.rindex(THINK_END)], allow=TAGS))


class AnswerFile:
  """answers.jsonl: a line an answer, written a batch at a time, so that a killed stage goes on at its next batch.

  writes: False for a process that only reads what another writes.
  """

  def __init__(self, path: pathlib.Path, writes: bool = True):
    self.path, self._writes = path, writes

  def resume(self, batches: Iterable[list[tuple[int, int]]]) -> Iterator[list[dict]]:
    """The batches that are whole in the file; what follows them, such as a line that was cut, is taken away.

    batches: (problem's id, sample) of every answer of each batch. Raises ValueError if the file has other answers.
    """
    self.path.touch()
    kept = 0
    with self.path.open('rb') as file:
      for batch in batches:
        lines = [line for line in (file.readline() for _ in batch) if line.endswith(b'\n')]
        if len(lines) < len(batch):
          break
        answers = [self._read(line, at) for line, at in zip(lines, batch, strict=True)]
        kept += sum(map(len, lines))
        yield answers
    if self._writes:
      os.truncate(self.path, kept)

  def _read(self, line: bytes, at: tuple[int, int]) -> dict:
    try:
      answer = json.loads(line)
      there = answer['id'], answer['sample']
    except (ValueError, KeyError, TypeError):
      there = None
    if there != at:
      raise ValueError(f'{self.path}: where the answer of problem {at[0]}, sample {at[1]} should be, there is another: '
                       'has the problem file changed? Use another workdir')
    return answer

  def append(self, answers: list[dict]):
    """Writes a batch's lines; they are the kernel's when this returns."""
    if not self._writes:
      return
    with self.path.open('a', encoding='utf-8', newline='\n') as file:
      file.write(''.join(json.dumps(answer, ensure_ascii=False) + '\n' for answer in answers))

  def __iter__(self) -> Iterator[dict]:
    with self.path.open('rb') as file:
      yield from map(json.loads, file)
