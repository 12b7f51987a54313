"""Small programs with known answers, made for the planner's child process as a stage's are."""

import os
import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_rl.models.attend import attend
from moe_rl.models.transformer import write_cell
from moe_rl.planner import topologies
from moe_rl.planner.programs import Made
from moe_rl.runtime.mesh import AXES, Layout
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

  def of_length(x, n, m):
    def inner(i, c):
      with jax.named_scope('exchanges'):
        return jax.lax.fori_loop(0, m, lambda j, d: jnp.tanh(d @ d), c + i.astype(c.dtype))
    with jax.named_scope('microbatches'):
      return jax.lax.fori_loop(0, n, inner, x)

  def stacked(x, up, down):
    def layer(c, w):
      return jnp.einsum('tf,fd->td', jnp.tanh(jnp.einsum('td,fd->tf', c, w[0])), w[1]), None
    return jax.lax.scan(layer, x, (up, down))[0]

  def manual(f):
    return jax.shard_map(f, mesh=mesh, in_specs=P('b'), out_specs=P('b'), check_vma=False)
  square, number = array((512, 512), P()), array((), P(), jnp.int32)
  return Made([
    Program('gathered', jax.jit(manual(gathered)), (array((1024, 512), P('b')),)),
    Program('summed', jax.jit(manual(lambda x: summed(x, 7))), (array((512, 256), P('b')),)),
    Program('nested', jax.jit(nested), (square,)),
    Program('exchanged', jax.jit(manual(exchanged)), (array((512, 512), P('b')),)),
    Program('of length', jax.jit(of_length), (square, number, number)),
    Program('stacked', jax.jit(stacked), (array((8, 1024), P()), *[array((12, 2048, 1024), P())] * 2)),
    Program('too big', jax.jit(jnp.sin), (array((1 << 16, 1 << 18), P()),)),
  ], mesh, resident={'kept': array((1024, 1024), P('a'))})


def decoding(topology) -> Made:
  """Layers in a scan that read their own cells, all layers' carried by it, and write one each: a token's step."""
  mesh = Mesh(topologies.order(topology, (topology.devices,)), ('a',))

  def array(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

  def layer(carried, layer):
    x, own, length = carried
    weights = jax.nn.softmax(jnp.einsum('bgsz,bghz->bghs', own[layer], x).astype(jnp.float32)).astype(x.dtype)
    attended = jnp.einsum('bghs,bgsz->bghz', weights, own[layer])
    return (attended, write_cell(own, attended[:, :, 0], layer, length), length), None

  def steps(x, own, length):
    def step(_, carried):
      x, own, length = jax.lax.scan(layer, carried, jnp.arange(8))[0]
      return x, own, length + 1
    return jax.lax.fori_loop(0, 100, step, (x, own, length))
  arguments = array((1, 4, 128, 576)), array((8, 1, 4, 4096, 576)), array((), jnp.int32)
  return Made([Program('decoding', jax.jit(steps, donate_argnums=1), arguments)], mesh)


def attending(topology) -> Made:
  """The fused kernel, there and back, on V3's widths of heads and a row of R1-Zero's length with its prompt."""
  layout = Layout(Mesh(topologies.order(topology, (topology.devices, 1, 1, 1)), AXES))
  rows = NamedSharding(layout.mesh, P('data'))

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((topology.devices, *shape), dtype, sharding=rows)

  def gradients(query, key, value, segments):
    return jax.grad(lambda *a: attend(*a, segments, layout).astype(jnp.float32).sum(), (0, 1, 2))(query, key, value)
  length = 33_792
  return Made([Program('attending', jax.jit(gradients), (
    array(length, 2, 192), array(length, 2, 192), array(length, 2, 128), array(length, dtype=jnp.int32)))], layout.mesh)


def end(status: int, words: str):
  """Ends the process at once, as a compiler that aborts does."""
  print(words, file=sys.stderr, flush=True)
  os._exit(status)


def deadly(topology) -> Made:
  """The first program takes its process with it, the second is as any."""
  mesh = Mesh(topologies.order(topology, (2, 2)), ('a', 'b'))
  x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P()))
  return Made([Program('deadly', jax.jit(lambda x: end(9, 'Check failed: out of luck')), (x,)),
               Program('harmless', jax.jit(jnp.sin), (x,))], mesh)


def stillborn(topology) -> Made:
  end(7, 'no programs today')
