"""Grain pipelines: packed rows of the corpus and of traces, shuffled prompts for RL. All can say where they are."""

import math
import random

import grain.python as grain
import numpy as np

from moe_rl.data.corpus import Mix, document
from moe_rl.data.packing import shuffled_rows
from moe_rl.data.tasks import Chain
from moe_rl.data.templates import TAGS
from moe_rl.data.tokenizer import Tokenizer
from moe_rl.data.traces import Example


class CorpusRows(grain.RandomAccessDataSource):
  """Row i of the corpus: documents packed until `row_tokens` are full, the last one cut.

  Row i depends on (seed, i) alone. A row is dict(ids, positions, segments) of int32 [row_tokens]; segments count
  from 1 and there is no padding.
  """

  def __init__(self, chain: Chain, mix: Mix, tokenizer: Tokenizer, seed: int, rows: int, row_tokens: int):
    self._chain, self._mix, self._tokenizer = chain, mix, tokenizer
    self._seed, self._rows, self._row_tokens = seed, rows, row_tokens

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, index) -> dict[str, np.ndarray]:
    rng = random.Random(f'corpus/{self._seed}/{int(index)}')
    row = {name: np.zeros(self._row_tokens, np.int32) for name in ('ids', 'positions', 'segments')}
    at, segment = 0, 0
    while at < self._row_tokens:
      ids = self._tokenizer.encode(document(self._chain, self._mix, rng), allow=TAGS) + [self._tokenizer.eos_id]
      ids, segment = ids[:self._row_tokens - at], segment + 1
      cells = slice(at, at + len(ids))
      row['ids'][cells], row['positions'][cells], row['segments'][cells] = ids, np.arange(len(ids)), segment
      at += len(ids)
    return row


class TraceRows(grain.RandomAccessDataSource):
  """Row i of a run over examples: those of every epoch in an order of its own, packed whole, epoch after epoch.

  A row is dict(ids, positions, segments) of int32 [row_tokens] and answer, bool [row_tokens], true on the response's
  tokens, eos included; segments count from 1 within the row, 0 is padding. An epoch's last rows share a step with the
  next epoch's first ones; the last step is filled up with empty rows.
  """

  def __init__(self, examples: list[Example], seed: int, epochs: int, rows_per_step: int, row_tokens: int):
    self._examples, self._row_tokens = examples, row_tokens
    lengths = np.array([len(e.ids) for e in examples])
    self._members = [row for epoch in range(epochs)
                     for row in shuffled_rows(lengths, row_tokens, f'traces/{seed}/{epoch}')]
    self.steps = -(-len(self._members) // rows_per_step)
    self._rows = self.steps * rows_per_step

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, index) -> dict[str, np.ndarray]:
    row = {name: np.zeros(self._row_tokens, np.int32) for name in ('ids', 'positions', 'segments')}
    row['answer'], at = np.zeros(self._row_tokens, bool), 0
    members = self._members[index] if index < len(self._members) else []
    for segment, n in enumerate(members, 1):
      ids, prompt = self._examples[n].ids, self._examples[n].prompt
      cells = slice(at, at + len(ids))
      row['ids'][cells], row['positions'][cells], row['segments'][cells] = ids, np.arange(len(ids)), segment
      row['answer'][at + prompt:at + len(ids)] = True
      at += len(ids)
    return row


class StepPrompts:
  """The prompts of each step: the task's, and from step `start` on `count` general ones in place of as many of them.

  task, general: random access; count 0: there are no general ones; seeds: of the order of either, None keeps the
  task's; general ones come last in a batch; shard: as `batches` takes it, size and count being those of all processes.
  Where it is can be saved (`get_state`) and gone on from (`set_state`).
  """

  def __init__(self, task, size: int, seed: int | None, general=(), count: int = 0, start: int = 0,
               general_seed: int = 0, shard: tuple[int, int] = (0, 1)):
    self._size, self._count, self._start = size // shard[1], count // shard[1], start
    parts = math.gcd(size, count)  # divides both kinds of step
    self._task = batches(task, parts, shuffle_seed=seed, as_list=True, shard=shard)
    self._general = batches(general, count, shuffle_seed=general_seed, as_list=True, shard=shard) if count else None

  def take(self, step: int) -> list:
    """The next prompts, for the step after `step` ones."""
    mixed, out = self._general is not None and step >= self._start, []
    while len(out) < self._size - self._count * mixed:
      out += next(self._task)
    return out + (next(self._general) if mixed else [])

  def get_state(self) -> dict:
    return {'task': self._task.get_state(), 'general': self._general.get_state() if self._general else None}

  def set_state(self, state: dict):
    self._task.set_state(state['task'])
    if self._general:
      self._general.set_state(state['general'])


def batches(source, batch_size: int, *, shuffle_seed: int | None = None, as_list: bool = False,
            shard: tuple[int, int] = (0, 1)):
  """An endless Grain iterator over `source`, batch_size items a batch; `get_state` and `set_state` give its position.

  shuffle_seed: a new order each epoch (None keeps the order); as_list: batches are lists of items rather than stacked
  arrays; shard: (process index, process count), each process taking its own slice of every batch.
  Raises ValueError when the batch is larger than the source or does not divide over the processes.
  """
  index, count = shard
  if batch_size % count:
    raise ValueError(f'a batch of {batch_size} does not divide over {count} processes: use a multiple of {count}')
  if batch_size > len(source):
    raise ValueError(f'a batch of {batch_size} is larger than its source of {len(source)}: use a smaller batch')
  data = grain.MapDataset.source(source)
  if shuffle_seed is not None:
    data = data.seed(shuffle_seed).shuffle()
  data = data.repeat()[index::count].batch(batch_size // count, batch_fn=list if as_list else None)
  return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
