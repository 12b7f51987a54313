"""Grain pipelines: packed rows of the corpus for pre-training, shuffled prompts for RL. Both can say where they are."""

import random

import grain.python as grain
import numpy as np

from moe_rl.data.corpus import Mix, document
from moe_rl.data.tasks import Chain
from moe_rl.data.templates import TAGS
from moe_rl.data.tokenizer import Tokenizer


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
