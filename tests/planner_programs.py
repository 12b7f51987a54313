"""Small programs with known answers, made for the planner's child process as a stage's are."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_rl.planner import topologies
from moe_rl.planner.programs import Made
from moe_rl.runtime.programs import Program


def make(topology) -> Made:
  """On a mesh ('a', 'b') of 2 x 2."""
  mesh = Mesh(topologies.order(topology, (2, 2)), ('a', 'b'))

  def array(shape, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  def gathered(x):
    whole = jax.lax.all_gather(x, 'b', tiled=True)
    return whole @ whole[:512, :256]

  def summed(x, rounds):
    def body(c, _):
      return jnp.tanh(jax.lax.psum(c, 'b') * 0.5), None
    return jax.lax.scan(body, x, None, length=rounds)[0]

  def nested(x):
    def outer(c, _):
      return jax.lax.scan(lambda d, _: (jnp.tanh(d @ d), None), c, None, length=5)[0], None
    return jax.lax.scan(outer, x, None, length=3)[0]

  def exchanged(x):
    return jax.lax.all_to_all(x, 'b', 0, 1, tiled=True)

  def of_length(x, n):
    return jax.lax.fori_loop(0, n, lambda i, c: jnp.tanh(c @ c), x)

  def manual(f):
    return jax.shard_map(f, mesh=mesh, in_specs=P('b'), out_specs=P('b'), check_vma=False)
  square = array((512, 512), P())
  return Made([
    Program('gathered', jax.jit(manual(gathered)), (array((1024, 512), P('b')),)),
    Program('summed', jax.jit(manual(lambda x: summed(x, 7))), (array((512, 256), P('b')),)),
    Program('nested', jax.jit(nested), (square,)),
    Program('exchanged', jax.jit(manual(exchanged)), (array((512, 512), P('b')),)),
    Program('of length', jax.jit(of_length), (square, array((), P(), jnp.int32))),
    Program('too big', jax.jit(jnp.sin), (array((1 << 16, 1 << 18), P()),)),
  ], mesh, resident={'kept': array((1024, 1024), P('a'))})
