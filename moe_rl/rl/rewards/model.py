"""A trained reward model as a term of the reward: computed in the trainer's process, on its devices.

What it reads is what it was trained on: the final summary for helpfulness, the whole response for safety
(`data.preferences.judged`). Its number has no unit and no zero; GRPO compares it within a group.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_rl.data.preferences import Encoder
from moe_rl.data.tokenizer import Tokenizer, load_tokenizer
from moe_rl.models.checkpoints import open_checkpoint
from moe_rl.models.hf_import import abstract_variables, load_model
from moe_rl.models.transformer import Transformer
from moe_rl.rl.preference import scores
from moe_rl.runtime import hosts
from moe_rl.runtime import mesh as meshes
from moe_rl.runtime.programs import Program

SHORTEST = 64  # tokens of the narrowest batch; wider ones double
DEVICE_TOKENS = 2048  # of a batch, on each device that rows are split over


def make_last_scores(net: Transformer):
  """(variables, ids int32 [N, T], length int32 [N]) -> float32 [N]: the score at each row's last token."""
  def last_scores(variables: dict, ids_NxT: jax.Array, length_N: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids_NxT.shape[1], dtype=jnp.int32), ids_NxT.shape)
    score_NxT, _ = scores(net, variables, ids_NxT, positions, (positions < length_N[:, None]).astype(jnp.int32))
    return jnp.take_along_axis(score_NxT, jnp.maximum(length_N - 1, 0)[:, None], axis=1)[:, 0]
  return last_scores


class RewardModel:
  """The newest weights of a run of the stage `reward_model`.

  path: its workdir; tokenizer, template: in place of those that it was trained with. Config and headers are read at
  once, weights when they are first used. Raises ValueError for any other path, with the remedy.

  cut: responses of the last `scores` that were longer than the model can read, and were read without their end.
  """

  def __init__(self, path: str | os.PathLike, mesh, tokenizer: Tokenizer | None = None, template: str = ''):
    checkpoint = open_checkpoint(path)
    if checkpoint.kind != 'run' or checkpoint.model.head != 'scalar':
      raise ValueError(f'{checkpoint.where}: not a reward model: give the workdir of a run of the stage `reward_model` '
                       '(experiments/reward_model.py)')
    config = json.loads((checkpoint.path / 'config.json').read_text())
    self.kind, self.mesh, self._checkpoint, self.cut = config['reward_model']['kind'], mesh, checkpoint, 0
    self._encode = Encoder(self.kind, template or config['template'], tokenizer or load_tokenizer(config['tokenizer']))
    dtype = checkpoint.model.compute_dtype
    self._changes = dict(param_dtype=dtype, compute_dtype=dtype, remat='none')
    self.model = dataclasses.replace(checkpoint.model, **self._changes)
    self._abstract = abstract_variables(self.model, mesh)
    rows = meshes.rows(mesh)
    self._score = jax.jit(
      make_last_scores(Transformer(self.model, meshes.Layout(mesh))), out_shardings=rows,
      in_shardings=(jax.tree.map(lambda x: x.sharding, self._abstract), rows, rows))

  @functools.cached_property
  def variables(self) -> dict:
    return load_model(self._checkpoint, mesh=self.mesh, **self._changes)[1]

  def width(self, tokens: int) -> int:
    """Of the batch that a sequence goes into: by its own length alone, so that its neighbours change nothing."""
    width = SHORTEST
    while width < tokens:
      width *= 2
    return width

  def rows(self, width: int) -> int:
    return max(1, DEVICE_TOKENS // width) * meshes.rows_over(self.mesh.shape)

  def programs(self, longest: int) -> list[Program]:
    """One for each width that sequences of up to `longest` tokens need."""
    by_row, widths = meshes.rows(self.mesh), [SHORTEST]
    while widths[-1] < min(longest, self.model.max_length):
      widths.append(widths[-1] * 2)

    def ints(*shape):
      return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_row)
    return [Program(f'reward model {w}', self._score, (self._abstract, ints(self.rows(w), w), ints(self.rows(w))))
            for w in widths]

  def scores(self, questions: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """float32 [n]: for helpfulness any number, the higher the better; for safety the log-odds of being safe.

    Which others are scored beside a response changes its score by rounding only. All hosts have to ask at once, each
    for responses of its own.
    """
    self.cut = 0
    sequences = [self._fitting(self._encode(q, r)) for q, r in zip(questions, responses, strict=True)]
    out, by_width = np.zeros(len(sequences), np.float32), {}
    for n, ids in enumerate(sequences):
      by_width.setdefault(self.width(len(ids)), []).append(n)
    for width in sorted(set().union(*hosts.gather(list(by_width)))):
      members, rows = by_width.get(width, []), self.rows(width) // hosts.count()
      for start in range(0, max(hosts.gather(len(members))), rows):
        part = members[start:start + rows]
        ids, length = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row, n in enumerate(part):
          ids[row, :len(sequences[n])], length[row] = sequences[n], len(sequences[n])
        scored = self._score(self.variables, *hosts.spread([ids, length], like=self.variables))
        out[part] = hosts.own_rows(scored)[:len(part)]
    return out

  def _fitting(self, ids: tuple[int, ...]) -> tuple[int, ...]:
    if len(ids) <= self.model.max_length:
      return ids
    self.cut += 1
    return (*ids[:self.model.max_length - 1], ids[-1])
