"""Our own weight files: one safetensors file with flat names and the model's config in its metadata."""

import json
import pathlib

import flax
import jax
import numpy as np
import safetensors
import safetensors.numpy

EMBEDDED = pathlib.Path(__file__).parents[1] / 'data' / 'assets' / 'tiny_base.safetensors'


def save_weights(path: pathlib.Path, variables: dict, config: dict, dtype: str = 'bfloat16'):
  """Writes {'params': …, 'router': …} as `dtype` (biases stay float32) through a temporary file and a rename."""
  flat = flax.traverse_util.flatten_dict(jax.device_get(variables), sep='/')
  arrays = {k: np.asarray(v, np.float32 if k.startswith('router/') else np.dtype(dtype)) for k, v in flat.items()}
  temporary = path.with_name(path.name + '.partial')
  data = safetensors.numpy.save(arrays, metadata={'format': 'moe_rl', 'config': json.dumps(config)})
  temporary.write_bytes(_canonical(data))
  temporary.replace(path)


def _canonical(data: bytes) -> bytes:
  """The file with its metadata sorted: the library's order differs between processes, equal weights are equal bytes."""
  end = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:end])
  header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
  text = json.dumps(header, separators=(',', ':')).encode()
  text = text.ljust(-(-len(text) // 8) * 8)  # the format wants tensors aligned to 8 bytes
  return len(text).to_bytes(8, 'little') + text + data[end:]


def load_weights(path: str | pathlib.Path) -> tuple[dict, dict]:
  """(variables as nested numpy trees, the model config saved with them).

  'embedded' is the base that ships with the package. Raises ValueError with the path when it cannot be read.
  """
  path = EMBEDDED if str(path) == 'embedded' else pathlib.Path(path)
  try:
    with safetensors.safe_open(path, framework='numpy') as f:
      metadata = f.metadata() or {}
      flat = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
  except (OSError, safetensors.SafetensorError) as e:
    raise ValueError(f"config.init_from '{path}': cannot be read ({e}); "
                     "give 'embedded', a .safetensors file of moe_rl, or '' for random weights") from e
  if metadata.get('format') != 'moe_rl':
    raise ValueError(f"config.init_from '{path}': a safetensors file, but not one written by moe_rl")
  return flax.traverse_util.unflatten_dict(flat, sep='/'), json.loads(metadata['config'])
