"""Our own weight files: one safetensors file with flat names and the model's config in its metadata."""

import json
import pathlib

import flax
import jax
import numpy as np

from moe_rl.models.safetensors_io import plan_shards, write_file

_ASSETS = pathlib.Path(__file__).parents[1] / 'data' / 'assets'
# The bases in the package, by the name that config.init_from has for them.
EMBEDDED = {'embedded': _ASSETS / 'tiny_base.safetensors', 'embedded_dense': _ASSETS / 'tiny_dense_base.safetensors'}


def save_weights(path: pathlib.Path, variables: dict, config: dict, dtype: str = 'bfloat16'):
  """Writes {'params': …, 'router': …} as `dtype` (biases of routers stay float32), array by array, through a temporary
  file and a rename. Equal weights are equal bytes. `checkpoints.open_checkpoint` reads it."""
  flat = dict(sorted(flax.traverse_util.flatten_dict(variables, sep='/').items()))
  shapes = {name: (np.dtype('float32' if name.startswith('router/') else dtype), leaf.shape)
            for name, leaf in flat.items()}
  [shapes] = plan_shards(shapes, limit=2**63)
  temporary = path.with_name(path.name + '.partial')
  write_file(temporary, shapes, lambda name: np.asarray(jax.device_get(flat[name]), shapes[name][0]),
             {'format': 'moe_rl', 'config': json.dumps(config)})
  temporary.replace(path)
