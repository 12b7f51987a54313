"""Log-probabilities of given ids under any checkpoint, to compare with another framework.

`python -m moe_rl.score --init_from=DIR --ids=ids.npy --out=out.npz [--logits] [--pad_id=N] [--dtype=float32]`

ids.npy: int32 [N, L]. out.npz: `logprobs` float32 [N, L - 1], nats, of each next id given those before it; with
--logits also `logits` float32 [N, L, V]. The ids equal to --pad_id that a row begins or ends with are padding (those
between are tokens): nothing sees them, positions count from a row's first token, and what stands on padding or predicts
it is 0.
"""

import argparse
import contextlib
import math
import os
import pathlib
import sys
import zipfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_rl.models.checkpoints import check_speaks, open_checkpoint
from moe_rl.models.config import ModelConfig
from moe_rl.models.heads import token_logprobs
from moe_rl.models.hf_import import load_model
from moe_rl.models.transformer import Transformer
from moe_rl.runtime import mesh as meshes

BATCH_TOKENS = 2048  # in one forward pass; their logits over a vocabulary of 152k are 1.2 GB


def read_ids(path: str) -> np.ndarray:
  """The integers [N, L] of a .npy file. Raises ValueError for anything else, with what was found."""
  try:
    ids = np.load(path, allow_pickle=False)
  except FileNotFoundError as e:
    raise ValueError(f"--ids '{path}': there is no such file") from e
  except (OSError, ValueError, EOFError) as e:
    raise ValueError(f"--ids '{path}': not a .npy file ({e}): write it with numpy.save") from e
  if not isinstance(ids, np.ndarray):
    raise ValueError(f"--ids '{path}': an archive of arrays: give a single one, written with numpy.save")
  if not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f"--ids '{path}': holds {ids.dtype}, ids are integers: convert with .astype('int32')")
  if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
    raise ValueError(f"--ids '{path}': has shape {list(ids.shape)}, must be [N, L]: a row a sequence, of 2 ids or more")
  return ids


def tokens(ids_NxL: np.ndarray, pad_id: int | None) -> np.ndarray:
  """bool [N, L]: where there is a token, and not the padding that a row begins or ends with."""
  if pad_id is None:
    return np.ones(ids_NxL.shape, bool)
  kept = ids_NxL != pad_id
  return np.logical_or.accumulate(kept, 1) & np.logical_or.accumulate(kept[:, ::-1], 1)[:, ::-1]


def check_ids(ids_NxL: np.ndarray, token_NxL: np.ndarray, vocab_size: int, where: str):
  """Raises ValueError naming the first id that is not in the vocabulary."""
  bad = np.argwhere(token_NxL & ((ids_NxL < 0) | (ids_NxL >= vocab_size)))
  if len(bad):
    row, column = bad[0]
    raise ValueError(f'{where}: id {ids_NxL[row, column]} at [{row}, {column}] is not in the vocabulary '
                     f'(0 to {vocab_size - 1}): ids of another tokenizer, or padding to be named by --pad_id?')


def batches(model: ModelConfig, variables: dict, ids_NxL, token_NxL, mesh, with_logits: bool) -> Iterator[dict]:
  """{'logprobs' [n, L - 1], 'logits' [n, L, V] if wanted}: float32 of some rows after another, padding at 0.

  Each batch has at most `BATCH_TOKENS` tokens, or one row a device.
  """
  rows, length = ids_NxL.shape
  devices = mesh.devices.size
  size = max(min(BATCH_TOKENS // length, rows), 1)
  size = -(-size // devices) * devices
  precision = 'highest' if model.compute_dtype == 'float32' else None  # a TPU's default multiplies in bfloat16
  program = jax.jit(lambda *args: _score(model, with_logits, *args))
  for start in range(0, rows, size):
    empty = max(start + size - rows, 0)
    ids, token = (np.pad(a[start:start + size], ((0, empty), (0, 0))) for a in (ids_NxL, token_NxL))
    with jax.default_matmul_precision(precision):
      out = program(variables, *jax.device_put((np.where(token, ids, 0).astype(np.int32), token), meshes.rows(mesh)))
    yield {name: np.asarray(value)[:rows - start] for name, value in out.items()}


def _score(model, with_logits, variables, ids, token):
  net = Transformer(model)
  positions = jnp.maximum(jnp.cumsum(token, axis=1) - 1, 0).astype(jnp.int32)
  hidden = net.apply(variables, ids, positions, token.astype(jnp.int32)).hidden_NxTxD

  def logits_of(hidden):
    return net.apply(variables, hidden, method=net.logits)
  logits = logits_of(hidden) if with_logits else None
  logp, _ = (token_logprobs(lambda logits: logits, logits[:, :-1], ids[:, 1:]) if with_logits else
             token_logprobs(logits_of, hidden[:, :-1], ids[:, 1:]))
  out = {'logprobs': jnp.where(token[:, 1:] & token[:, :-1], logp, 0.0)}
  return out | {'logits': jnp.where(token[..., None], logits, 0.0)} if with_logits else out


@contextlib.contextmanager
def archive(path: pathlib.Path, shapes: dict[str, tuple[int, ...]]):
  """Yields `write(name, rows)` for a .npz of float32 arrays of these shapes; the first name's rows go straight to the
  file, the others are held until the end. The file appears at `path` whole or not at all."""
  temporary = path.with_name(path.name + '.partial')
  first, *rest = shapes
  held = {name: [] for name in rest}

  def entry(zipped, name):
    file = zipped.open(f'{name}.npy', 'w', force_zip64=True)
    np.lib.format.write_array_header_1_0(
      file, {'descr': '<f4', 'fortran_order': False, 'shape': shapes[name]})
    return file
  try:
    with zipfile.ZipFile(temporary, 'w') as zipped:
      with entry(zipped, first) as file:
        def write(name, rows):
          file.write(rows.astype('<f4').tobytes()) if name == first else held[name].append(rows)
        yield write
      for name in rest:
        with entry(zipped, name) as file:
          file.write(np.concatenate(held[name]).astype('<f4').tobytes())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def run(init_from: str, ids_path: str, out: str, with_logits: bool, pad_id: int | None, dtype: str) -> str:
  """Scores and writes; a sentence on the result. Raises ValueError on bad input, before any compile."""
  ids, path = read_ids(ids_path), pathlib.Path(out)
  if path.suffix != '.npz' or path.is_dir() or not path.absolute().parent.is_dir():
    raise ValueError(f"--out '{out}': give the name of a .npz file in a folder that exists")
  token = tokens(ids, pad_id)
  checkpoint = open_checkpoint(init_from)
  check_speaks(checkpoint)
  model = checkpoint.model
  check_ids(ids, token, model.vocab_size, f"--ids '{ids_path}'")
  if ids.shape[1] > model.max_length:
    print(f'note: rows of {ids.shape[1]} ids, the model was made for {model.max_length} at most', file=sys.stderr)
  fsdp = math.gcd(model.width, jax.device_count())
  mesh = meshes.make_mesh(dict(data=jax.device_count() // fsdp, fsdp=fsdp, expert=1, tensor=1))
  model, variables = load_model(
    checkpoint, mesh=mesh, compute_dtype=dtype, param_dtype=dtype, remat='none', mtp_layers=0,
    max_length=max(model.max_length, ids.shape[1]))
  rows, length = ids.shape
  shapes = {'logits': (rows, length, model.vocab_size)} if with_logits else {}
  shapes['logprobs'] = (rows, length - 1)
  total = 0.0
  with archive(path, shapes) as write, tqdm.tqdm(total=rows, desc='scoring', unit='row') as bar:
    for batch in batches(model, variables, ids, token, mesh, with_logits):
      for name, values in batch.items():
        write(name, values)
      total += batch['logprobs'].sum(dtype=np.float64)
      bar.update(len(batch['logprobs']))
  count = int((token[:, 1:] & token[:, :-1]).sum())
  return f'{path}: {count} log-probs of {rows} rows, {total / max(count, 1):.4f} nats a token'


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog='python -m moe_rl.score', description=__doc__.splitlines()[0])
  parser.add_argument('--init_from', required=True, help='a checkpoint: a folder, a hub id, a file of ours, a run')
  parser.add_argument('--ids', required=True, help='.npy, integers [N, L]')
  parser.add_argument('--out', required=True, help='.npz to write')
  parser.add_argument('--logits', action='store_true', help='write the logits too')
  parser.add_argument('--pad_id', type=int, help='id of the padding at the ends of rows')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='to load and compute in')
  args = parser.parse_args(argv)
  try:
    print(run(args.init_from, args.ids, args.out, args.logits, args.pad_id, args.dtype))
  except ValueError as e:  # bad input: the message is for a person, a traceback is not
    print(f'error: {e}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
