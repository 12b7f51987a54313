"""The process that lowers and compiles: `python -m moe_rl.planner.child REQUEST.json`, started by
`compile.compile_all`.

It writes one JSON line for each thing that happens to the request's `events` file, and the compiler's dump of program
N to
the folder `dump`/N. Ends with status 0 unless the programs could not even be made.
"""

import importlib
import json
import pathlib
import sys
import time

from moe_rl.planner import topologies

MEMORY = {  # what a program needs, by kind: fields of the compiler's CompiledMemoryStats
  'arguments': 'argument_size_in_bytes', 'outputs': 'output_size_in_bytes', 'aliased': 'alias_size_in_bytes',
  'temporaries': 'temp_size_in_bytes', 'code': 'generated_code_size_in_bytes'}
HOST = ('host_argument_size_in_bytes', 'host_temp_size_in_bytes')  # what it keeps in its host's memory


def main(path: str):
  request = json.loads(pathlib.Path(path).read_text())

  def tell(**event):
    with pathlib.Path(request['events']).open('a') as events:
      print(json.dumps(event), file=events)
  topology = topologies.parse(request['topology'])
  try:
    module, _, function = request['factory'].partition(':')
    made = getattr(importlib.import_module(module), function)(topology, **request['arguments'])
  except ValueError as e:
    tell(event='refused', why=str(e))
    sys.exit(1)
  tell(event='made', programs=[p.name for p in made.programs],
       places=[topologies.place(d, topology) for d in made.mesh.devices.flat], notes=made.notes)
  for n, program in enumerate(made.programs):
    if n >= request['first'] and (not request['only'] or program.name in request['only']):
      tell(**one(n, program, made, pathlib.Path(request['dump']) / str(n), tell))


def one(n: int, program, made, dump: pathlib.Path, tell) -> dict:
  """Compiles one program. What goes wrong in the compiler is an answer too."""
  dump.mkdir(parents=True, exist_ok=True)
  done = {'event': 'done', 'program': n, 'resident': resident(program, made.resident)}
  started = time.time()
  tell(event='begun', program=n, **{k: v for k, v in done.items() if k == 'resident'})
  try:
    lowered = program.lower()
    tell(event='lowered', program=n, seconds=time.time() - started)
    started = time.time()
    compiled = lowered.compile(compiler_options={'xla_dump_to': str(dump), 'xla_dump_hlo_as_text': True})
  except Exception as e:  # the compiler's errors have no common type
    return done | {'error': str(e), 'seconds': time.time() - started}
  done['seconds'] = time.time() - started
  stats = compiled.memory_analysis()
  done['memory'] = {k: getattr(stats, field, 0) for k, field in MEMORY.items()}
  done['memory']['host'] = sum(getattr(stats, field, 0) for field in HOST)
  try:
    told = compiled.cost_analysis() or {}
    done['compiler'] = {k: told[k] for k in ('flops', 'bytes accessed', 'optimal_seconds') if k in told}
  except Exception:  # not every program has one
    done['compiler'] = {}
  return done


def resident(program, state) -> float:
  """Bytes a device of the run's state that lie in HBM while the program runs and are none of its arguments."""
  import jax

  from moe_rl.runtime.mesh import HOST_MEMORY
  if state is None or program.name == 'init':  # which makes the state
    return 0.0
  own = {id(leaf) for leaf in jax.tree.leaves(program.arguments)}
  return float(sum(shard_bytes(leaf) for leaf in jax.tree.leaves(state)
                   if id(leaf) not in own and leaf.sharding.memory_kind != HOST_MEMORY))


def shard_bytes(leaf) -> int:
  """Of a ShapeDtypeStruct with a sharding: what one device holds."""
  import math

  import jax.numpy as jnp
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize


if __name__ == '__main__':
  topologies.set_environment()
  main(sys.argv[1])
