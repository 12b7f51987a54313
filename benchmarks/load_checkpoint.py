"""Host memory and rate of loading a checkpoint onto several devices.

python benchmarks/load_checkpoint.py [--gib=4] [--devices=8] [--mesh=fsdp] [--fp8] [--folder=DIR]

Writes a synthetic bfloat16 checkpoint with DeepSeek-V3's names, tensor by tensor, into a temporary folder, and loads it
in a fresh process onto CPU devices, whose memory is the process's own. Prints one JSON object: peak resident memory of
that process, less the bytes of the arrays, must stay under 1 GiB; `idle` is its peak before it began to load.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

GIB = 1 << 30
LIMIT_GIB = 1.0
LOAD = """
import json, resource, sys, time
import jax
from moe_rl.models.hf_import import load_model
from moe_rl.runtime import mesh as meshes
sizes = dict.fromkeys(meshes.AXES, 1) | json.loads(sys.argv[2])
mesh = meshes.make_mesh(sizes)
jax.block_until_ready([jax.device_put(0, d) for d in jax.devices()])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
idle, start = peak(), time.perf_counter()
model, variables = load_model(sys.argv[1], mesh=mesh, param_dtype='bfloat16')
seconds = time.perf_counter() - start
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(variables) for shard in leaf.addressable_shards)
print(json.dumps(dict(idle=idle, peak=peak(), held=held, seconds=seconds)))
"""


def make(folder: pathlib.Path, gib: float, fp8: bool) -> int:
  """The checkpoint, about `gib` GiB as bfloat16 (half of that as FP8); returns its bytes."""
  from moe_rl.models.config import preset
  from moe_rl.models.hf_config import to_hf_config
  from moe_rl.models.hf_export import FP8_CONFIG, announced
  from moe_rl.models.safetensors_io import size_of, write_folder
  sizes = dict(vocab_size=32_768, width=2048, layers=6, dense_layers=1, dense_ff=8192, expert_ff=1024, heads=16,
               experts=16, q_lora=0, mtp_layers=0)
  while True:  # experts are what grows
    model = preset('v3_671b', **sizes)
    if size_of(announced(model, 'bfloat16')) >= gib * GIB:
      break
    sizes['experts'] += 8
  shapes, rng = announced(model, 'fp8' if fp8 else 'bfloat16'), np.random.default_rng(0)

  def tensor(name):
    dtype, shape = shapes[name]
    if dtype == ml_dtypes.float8_e4m3fn:
      return rng.integers(0, 0x7f, shape, np.uint8).view(dtype)  # all that is finite and positive
    return rng.random(shape, np.float32).astype(dtype)
  config = to_hf_config(model, dtype='bfloat16') | ({'quantization_config': FP8_CONFIG} if fp8 else {})
  (folder / 'config.json').write_text(json.dumps(config))
  write_folder(folder, shapes, tensor, GIB)
  return size_of(shapes)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--gib', type=float, default=4.0)
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--mesh', default='fsdp', help='the axis along which the devices lie')
  parser.add_argument('--fp8', action='store_true')
  parser.add_argument('--folder', help='where the temporary folder is made')
  args = parser.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    start = time.perf_counter()
    size = make(pathlib.Path(folder), args.gib, args.fp8)
    written = time.perf_counter() - start
    environment = os.environ | {'XLA_FLAGS': f'--xla_force_host_platform_device_count={args.devices}'}
    done = subprocess.run([sys.executable, '-c', LOAD, folder, json.dumps({args.mesh: args.devices})], env=environment,
                          text=True, stdout=subprocess.PIPE, check=True)
  found = json.loads(done.stdout)
  beyond = (found['peak'] - found['held']) / GIB  # arrays that are on every device count as often
  print(json.dumps({
    'files_gib': size / GIB, 'arrays_gib': found['held'] / GIB, 'peak_gib': found['peak'] / GIB, 'beyond_gib': beyond,
    'idle_gib': found['idle'] / GIB, 'limit_gib': LIMIT_GIB, 'holds': beyond < LIMIT_GIB,
    'load_seconds': found['seconds'], 'mib_per_second': size / 2**20 / found['seconds'], 'write_seconds': written,
    'devices': args.devices, 'mesh': args.mesh}, indent=1))
  return 0 if beyond < LIMIT_GIB else 1


if __name__ == '__main__':
  sys.exit(main())
