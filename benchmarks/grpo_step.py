"""How much of the machine's matrix-product rate a GRPO step reaches, and where its time goes.

python benchmarks/grpo_step.py [--steps=60] [--last=30] [--config=experiments/r1_zero.py]

Runs the default job for some steps in a temporary folder and takes medians over the last of them, when answers are as
long as in most of a run. Useful FLOPs (moe_rl/runtime/costs.py) over wall seconds, against the best float32 product of
this machine, by all its threads, measured before and after in the same run. Prints one JSON object.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe_rl import config as configs
from moe_rl.main import launch, load_experiment
from moe_rl.rl.objectives import chosen
from moe_rl.runtime.costs import grpo_flops


def gemm_rate(size: int = 2048, tries: int = 10) -> float:
  """Best float32 FLOP/s of a size^3 product."""
  a = jnp.ones((size, size))
  product = jax.jit(lambda a: a @ a)
  product(a).block_until_ready()
  seconds = []
  for _ in range(tries):
    start = time.perf_counter()
    product(a).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


def apart(function):
  """Its result in a process of its own, as this one's devices may have a thread each."""
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as other:
    return other.submit(function).result()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=60)
  parser.add_argument('--last', type=int, default=30)
  parser.add_argument('--config', default='experiments/r1_zero.py')
  arguments = parser.parse_args()
  config = load_experiment(arguments.config)
  config.rl.steps, config.eval.every, config.checkpoint.every = arguments.steps, 0, 0

  before = apart(gemm_rate)
  with tempfile.TemporaryDirectory() as folder:
    launch(config, folder)
    with open(f'{folder}/metrics.jsonl') as f:
      steps = [json.loads(line) for line in f][-arguments.last:]
  rate = max(before, apart(gemm_rate))
  model = configs.model_config(config)
  shape = (config.rl.prompts_per_step, config.rl.group_size)
  rows, split = [], {}
  for s in steps:
    prompt = np.full(shape[0], s['length/prompt'])
    flops = grpo_flops(model, prompt, np.full(shape, s['length/mean']), chosen(config.rl).kl_weight > 0)
    seconds = {k: s['time'][f'seconds/{k}'] for k in ('rollout', 'reward', 'update')}
    rows.append({'share': sum(flops.values()) / sum(seconds.values()) / rate,
                 'rollout_share': flops['rollout'] / seconds['rollout'] / rate,
                 'update_share': flops['update'] / seconds['update'] / rate, **seconds})
  split = {k: float(np.median([r[k] for r in rows])) for k in rows[0]}
  print(json.dumps({'gemm_gflops': rate / 1e9, 'steps': len(rows), **split,
                    'tokens': float(np.median([s['length/mean'] for s in steps]) * shape[0] * shape[1])}, indent=1))


if __name__ == '__main__':
  main()
