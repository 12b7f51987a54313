"""Procedural tasks: endless problems with checkable answers, addressed by (seed, split, index).

A problem belongs to the held-out split by a hash of its own text, so no held-out question is ever a training question,
whatever the seeds, and the pre-training corpus keeps away from the same set.
"""

import dataclasses
import random
import zlib

from moe_rl.data.problems import Problem

HELD_OUT_SHARE = 8  # one question in so many
SPLITS = ('train', 'held_out')


@dataclasses.dataclass(frozen=True)
class Chain:
  """`8+1-8+9=?`: one-digit terms from left to right, every running total within 0..max_total. A problem's level is its
  number of terms."""

  seed: int = 0
  min_terms: int = 4
  max_terms: int = 8
  max_total: int = 50

  def problem(self, split: str, index: int) -> Problem:
    """The index-th problem of a split; the same on every machine. Raises ValueError for an unknown split."""
    if split not in SPLITS:
      raise ValueError(f"split '{split}': use one of {', '.join(SPLITS)}")
    rng = random.Random(f'chain/{self.seed}/{split}/{index}')
    while True:
      question, totals = self.draw(rng)
      if held_out(question) == (split == 'held_out'):
        return Problem(index, question, str(totals[-1]), 'integer', str(len(totals)))

  def draw(self, rng: random.Random) -> tuple[str, list[int]]:
    """A question and its running totals, the first term being the first total."""
    totals, question = [rng.randint(1, 9)], ''
    question = str(totals[0])
    for _ in range(rng.randint(self.min_terms, self.max_terms) - 1):
      term = rng.randint(1, 9)
      sign = rng.choice('+-')
      if totals[-1] - term < 0:
        sign = '+'
      elif totals[-1] + term > self.max_total:
        sign = '-'
      totals.append(totals[-1] + (term if sign == '+' else -term))
      question += f'{sign}{term}'
    return question + '=?', totals


def held_out(question: str) -> bool:
  """Whether a question's text falls in the held-out split."""
  return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


class Problems:
  """A finite or endless list of problems as Grain wants it: len and getitem, random access."""

  def __init__(self, get, length: int):
    self._get, self._length = get, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Problem:
    return self._get(int(index) % self._length)
