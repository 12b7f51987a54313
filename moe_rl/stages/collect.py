"""The loop of the stages that only sample: batches of prompts to answers in a file, from wherever it is."""

import functools
import json
import pathlib
from collections.abc import Callable

import tqdm

from moe_rl.data.prompts import Prompt
from moe_rl.models.checkpoints import Checkpoint
from moe_rl.runtime.provenance import write_json
from moe_rl.runtime.run import Workdir
from moe_rl.stages.sampling import AnswerFile, Judge, Sampling, Weights, answers_of_all, in_batches, without_texts

ANSWERS = 'answers.jsonl'


def claim(folder: Workdir, checkpoint: Checkpoint):
  """Makes the workdir this config's and this checkpoint's own, before anything is sampled.

  Raises ValueError if it was begun with another checkpoint of the run that config.init_from names.
  """
  source = {'checkpoint': str(checkpoint.path), 'step': checkpoint.step}
  path = folder.path / 'checkpoint.json'
  if path.exists() and (begun := json.loads(path.read_text(encoding='utf-8'))) != source:
    raise ValueError(f'--workdir {folder.path} was begun with step {begun["step"]} of {begun["checkpoint"]}; the '
                     f'newest of config.init_from is step {checkpoint.step} of {checkpoint.path}: use another workdir')
  folder.open()
  if folder.main:
    write_json(path, source)
  folder.catch_signals()


def begin(folder: Workdir, stage: Sampling, notes: list[str]) -> Weights:
  """The weights to sample from, once the workdir is theirs; notes: on the prompts, printed."""
  weights = stage.load()
  claim(folder, weights.checkpoint)
  print('\n'.join(notes), flush=True)
  return weights


def collect(folder: Workdir, stage: Sampling, weights: Weights, key, judge: Judge, prompts: list[Prompt],
            progress: Callable[[list[dict]], str]) -> tuple[list[dict], bool]:
  """(answers to all prompts without their texts, True), or those so far and False if the stage was told to stop.

  They are kept in answers.jsonl. Batches that are there are not sampled again: addressed randomness would give the
  same. progress: (a batch's answers) -> what the progress bar says.
  """
  file, batches = AnswerFile(folder.path / ANSWERS, folder.main), list(in_batches(prompts, stage.prompts_per_batch))
  answers, done = [], 0
  with tqdm.tqdm(total=len(prompts), unit='prompt', disable=not folder.main, mininterval=1) as bar:
    def add(batch, found):
      answers.extend(map(without_texts, found))
      bar.set_postfix_str(progress(found), refresh=False)
      bar.update(len(batch))
    for found in file.resume([(p.problem.id, n) for p in batch for n in range(stage.settings['group'])]
                             for batch, _ in batches):
      add(batches[done][0], found)
      done += 1
    if folder.agreed(done, 'the number of batches in answers.jsonl is'):
      bar.write(f'{done} of {len(batches)} batches were there')
    for batch, filled in batches[done:]:
      if folder.stop_requested:
        break
      found = answers_of_all(judge, functools.partial(stage.sample, weights, key), batch, filled)
      file.append(found)
      add(batch, found)
      done += 1
  return answers, done == len(batches)


def described(config, stage: Sampling, checkpoint: Checkpoint, example: Prompt) -> dict:
  """Where answers come from, for people and for whoever wants them again."""
  t, s = config.task, stage.settings
  return {
    'checkpoint': {'init_from': config.init_from, 'path': str(pathlib.Path(checkpoint.path).absolute()),
                   'kind': checkpoint.kind, 'step': checkpoint.step},
    'task': {'name': t.name, 'path': t.get('eval_path') or t.path},
    'sampling': {'temperature': s['temperature'], 'top_p': s['top_p'], 'top_k': s.get('top_k', 0),
                 'samples': s['group'], 'max_new_tokens': stage.max_new, 'max_prompt_tokens': stage.width,
                 'seed': config.seed},
    'template': {'name': config.template, 'tokenizer': config.tokenizer,
                 'example': stage.tokenizer.decode(example.ids)}}
