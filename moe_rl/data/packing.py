"""Where samples go in packed rows."""

import random

import numpy as np

WINDOW = 1024  # examples that are placed together: a row is found by trying, and more would hardly fill rows better


def place(lengths: np.ndarray, capacity: int) -> tuple[list[int], list[int], int]:
  """First-fit decreasing: (row of each sample, its start in the row, rows used). Ties keep their order."""
  row_of, start_of, used = [0] * len(lengths), [0] * len(lengths), []
  for n in np.argsort(-lengths, kind='stable'):
    row = next((i for i, u in enumerate(used) if u + lengths[n] <= capacity), len(used))
    if row == len(used):
      used.append(0)
    row_of[n], start_of[n] = row, used[row]
    used[row] += int(lengths[n])
  return row_of, start_of, len(used)


def shuffled_rows(lengths: np.ndarray, capacity: int, address: str) -> list[list[int]]:
  """Rows of whole samples, each sample in one row: shuffled, placed a window at a time, the rows shuffled again (else a
  window's long samples would come first). The order depends on `address` alone."""
  rng, order, rows = random.Random(address), list(range(len(lengths))), []
  rng.shuffle(order)
  for start in range(0, len(order), WINDOW):
    window = order[start:start + WINDOW]
    row_of, _, used = place(lengths[window], capacity)
    members = [[] for _ in range(used)]
    for n, row in zip(window, row_of, strict=True):
      members[row].append(n)
    rows += members
  rng.shuffle(rows)
  return rows
