"""Growth with size on CPU: a MoE layer from 8 to 128 experts at a fixed top-k, and compilation from 16 to 61 layers.

    python benchmarks/moe_growth.py [--tokens=4096] [--width=512] [--expert_ff=256] [--top_k=8]

A layer's work at fixed top-k is the same for any number of experts: what grows is the router, the weights' traffic and
the products' fragmentation. Times are medians of alternating runs; ratios come from one process.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from moe_rl.models.config import preset
from moe_rl.models.moe import MoE
from moe_rl.models.transformer import Transformer, init


def layer(experts: int, tokens: int, width: int, expert_ff: int, top_k: int):
  """(forward, forward and backward), jitted calls without arguments, of one layer on random tokens."""
  config = preset('tiny', experts=experts, width=width, expert_ff=expert_ff, top_k=top_k)
  moe = MoE(config)
  x = jax.random.normal(jax.random.key(0), (tokens // 128, 128, width))
  valid = jnp.ones(x.shape[:2], bool)
  variables = jax.jit(moe.init)(jax.random.key(1), x, valid)

  def loss(params):
    return (moe.apply({**variables, 'params': params}, x, valid)[0] ** 2).sum()
  forward, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
  return (lambda: jax.block_until_ready(forward(variables['params'])),
          lambda: jax.block_until_ready(both(variables['params'])))


def medians(calls: dict, rounds: int) -> dict:
  """Median seconds of each call; the calls take turns, so that a busy second hits all alike."""
  seconds = {name: [] for name in calls}
  for call in calls.values():
    call()
  for _ in range(rounds):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(values) for name, values in seconds.items()}


def compile_seconds(layers: int) -> float:
  """Lowering and compiling a forward and backward pass of a narrow model of so many layers, the first one dense."""
  config = preset('tiny', layers=layers, width=64, heads=2, mtp_layers=0, remat='full')
  net = Transformer(config)
  ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
  variables = jax.eval_shape(lambda: init(config, jax.random.key(0)))

  def loss(params, rest, ids, positions, segments):
    return net.apply({**rest, 'params': params}, ids, positions, segments).hidden_NxTxD.sum()
  rest = {k: v for k, v in variables.items() if k != 'params'}
  start = time.perf_counter()
  jax.jit(jax.grad(loss)).lower(variables['params'], rest, ids, ids, ids).compile()
  return time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, value in (('tokens', 4096), ('width', 512), ('expert_ff', 256), ('top_k', 8), ('rounds', 7)):
    parser.add_argument(f'--{name}', type=int, default=value)
  args = parser.parse_args()
  forward, both = {}, {}
  for experts in (8, 32, 128):
    forward[experts], both[experts] = layer(experts, args.tokens, args.width, args.expert_ff, args.top_k)
  for what, calls in (('forward', forward), ('forward and backward', both)):
    for experts, seconds in (found := medians(calls, args.rounds)).items():
      print(f'{experts:4} experts  {what}: {1e3 * seconds:7.1f} ms, {seconds / found[8]:.2f} x')
  compile_seconds(2)  # warms the tracer
  few, many = compile_seconds(16), compile_seconds(61)
  print(f'compile: 16 layers {few:.1f} s, 61 layers {many:.1f} s, {many / few:.2f} x')


if __name__ == '__main__':
  main()
