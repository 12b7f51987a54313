"""Shared by tests: random checkpoints as the hub has them, and what tests ask of them.

Sizes are those of `families.CASES`; the numbers have all their bits, so that a lost one shows.
"""

import json
import pathlib
import zlib

import flax
import jax
import ml_dtypes
import numpy as np
from families import CASES

from moe_rl.config import base_config
from moe_rl.models import hf_export
from moe_rl.models.config import own_fields
from moe_rl.models.hf_config import from_hf_config
from moe_rl.models.hf_names import names
from moe_rl.models.safetensors_io import read_folder, write_folder
from moe_rl.runtime.run import Run
from moe_rl.runtime.state import TrainState


def case_of(family: str, **fields) -> str:
  """The first case of a family whose config.json has these fields."""
  return next(case for case, config in CASES.items()
              if config['model_type'] == family and all(config.get(k) == v for k, v in fields.items()))


MTP = case_of('deepseek_v3', num_nextn_predict_layers=1)
TIED, LLAMA, V2 = case_of('qwen2', tie_word_embeddings=True), case_of('llama'), case_of('deepseek_v2', q_lora_rank=24)
FLOATS = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


def random_tensor(name: str, slots: dict, dtype: np.dtype, shape: tuple[int, ...], std: float = 1.0) -> np.ndarray:
  """Normal numbers of all their bits, by name; a copy has its original's. std: of matrices."""
  seed, scale = slots[name].copy or name, std if len(shape) > 1 else 1.0
  return np.random.default_rng(zlib.crc32(seed.encode())).normal(0, scale, shape).astype(np.float32).astype(dtype)


def write_hub(folder: pathlib.Path, case=MTP, form='bfloat16', limit=10**9, std=1.0, **changes) -> pathlib.Path:
  """A random checkpoint of the case's sizes, as the hub has them; std: of its matrices; changes: to its config.json."""
  config = CASES[case] | changes
  model = from_hf_config(config, 'CASES')
  wanted, slots = hf_export.announced(model, form), names(model)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config))
  write_folder(folder, wanted, lambda name: random_tensor(name, slots, *wanted[name], std), limit)
  return folder


def flat(variables: dict) -> dict[str, np.ndarray]:
  return {k: np.asarray(v) for k, v in flax.traverse_util.flatten_dict(variables, sep='/').items()}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]):
  assert a.keys() == b.keys()
  for name in a:
    assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
    assert a[name].tobytes() == b[name].tobytes(), name


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
  return {name: tensor.read() for name, tensor in read_folder(folder).items()}


def rewrite(folder: pathlib.Path, tensors: dict[str, np.ndarray]):
  for path in folder.glob('*.safetensors*'):
    path.unlink()
  write_folder(folder, {k: (v.dtype, v.shape) for k, v in tensors.items()}, tensors.get, 10**9)


def saved_run(path: pathlib.Path, variables: dict, model, steps=(3,)) -> pathlib.Path:
  """A run's folder with a checkpoint of these weights at the last of the steps, of others before."""
  config = base_config('tiny')
  config.model = own_fields(model)
  run = Run(config, path)
  run.restore(None)
  for step in steps:
    params = jax.tree.map(lambda x, step=step: jax.numpy.asarray(x) + np.float32(step - steps[-1]), variables['params'])
    run.save(step, TrainState(jax.numpy.int32(step), params, variables['router'], {'m': params}, {}), {})
  run.close()
  return path
