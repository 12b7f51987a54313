"""softmax(q k) v for whole sequences: by blocks of queries, or by the fused kernel that ships with JAX on TPU."""

import functools

import jax
import jax.numpy as jnp

from moe_rl.runtime.mesh import Layout

QUERY_BLOCKS, FEW_BLOCKS, MOST_BLOCKS = (64, 256), 4, 16  # sizes and numbers of blocks of queries, for `query_block`
MASKED = -1e30  # added to a hidden score; finite, so that no inf - inf arises
KERNEL_BLOCK = 512  # the kernel's tiles at most
KERNEL_UNIT, LONG_UNIT, LONG = 128, 1024, 8192  # lengths are padded to these; beyond LONG wide blocks must divide them
KERNEL_BYTES = 12 * 2**20  # for a block of keys in the backward kernel, of the 16 MiB that v5e and v5p leave a kernel
MOST_PARTS = 12  # blocks of keys in a row, where their width may be chosen


def attend(query_NxTxHxK, key_NxTxHxK, value_NxTxHxV, segments_NxT, layout: Layout | None = None):
  """softmax(q k) v with float32 scores. Returns [N, T, H, V].

  segments: int32; a token sees itself and earlier tokens of its own segment, so packing isolates samples. layout: where
  the arrays live.
  """
  if layout and layout.platform == 'tpu':
    return _kernel(layout, query_NxTxHxK, key_NxTxHxK, value_NxTxHxV, segments_NxT)
  return _blocks(query_NxTxHxK, key_NxTxHxK, value_NxTxHxV, segments_NxT)


def causal_within(segments_NxT, start: int = 0, end: int | None = None) -> jax.Array:
  """bool [N, 1, end - start, end]: what the queries start .. end see of the keys up to `end`."""
  end = segments_NxT.shape[1] if end is None else end
  causal_TxS = jnp.arange(start, end)[:, None] >= jnp.arange(end)
  same_NxTxS = segments_NxT[:, start:end, None] == segments_NxT[:, None, :end]
  return (causal_TxS & same_NxTxS)[:, None]


def query_block(length: int) -> int:
  """Queries in a block of `attend`: as few as make short rows into 4 blocks and long ones into 16, but 64 at least."""
  least, most = QUERY_BLOCKS
  return max(least, min(most, -(-length // FEW_BLOCKS)), -(-length // MOST_BLOCKS))


def _blocks(query, key, value, segments):
  """Long rows go by blocks of queries, each with the keys up to its end: half the work, and scores of one block in
  memory."""
  length = query.shape[1]
  block = query_block(length)
  ends = [*range(block, length, block), length]
  out = [_attend(query[:, start:end], key[:, :end], value[:, :end], causal_within(segments, start, end))
         for start, end in zip([0, *ends], ends, strict=False)]
  return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def _attend(query_NxTxHxK, key_NxSxHxK, value_NxSxHxV, visible_Nx1xTxS):
  """Heads lead in the products and the sum of weights divides the output rather than the weights: on CPU half the time
  of the textbook order."""
  q, k, v = (a.swapaxes(1, 2) for a in (query_NxTxHxK, key_NxSxHxK, value_NxSxHxV))
  score = jnp.einsum('nhtd,nhsd->nhts', q, k, preferred_element_type=jnp.float32)
  score = score + jnp.where(visible_Nx1xTxS, 0.0, MASKED)
  p = jnp.exp(score - jax.lax.stop_gradient(score.max(-1, keepdims=True)))
  o = jnp.einsum('nhts,nhsd->nhtd', p.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return (o / p.sum(-1)[..., None]).astype(v.dtype).swapaxes(1, 2)


def kernel_blocks(length: int, key_dim: int, value_dim: int, itemsize: int) -> tuple[int, int]:
  """(queries and keys of a tile, keys of a block in the backward kernel) for rows of `length`, a multiple of 128.

  The backward kernel leaves a gradient of the queries for each of these blocks, to be summed: few are wanted, and
  narrow ones, as the whole block is computed where any of it is seen. What it holds of a block must fit: keys and
  values, two deep, and their gradients, two deep and once more in float32, all padded to 128 lanes.
  """
  block = next(b for b in (KERNEL_BLOCK, 256, KERNEL_UNIT) if length % b == 0)
  lanes = sum(-(-d // 128) * 128 for d in (key_dim, value_dim))
  widest = KERNEL_BYTES // (lanes * (4 * itemsize + 4))
  widths = [n * block for n in range(1, max(1, widest // block) + 1) if length // block % n == 0]
  return block, next((w for w in widths if w >= 1024 and length // w <= MOST_PARTS), widths[-1])


@functools.cache
def _splash(heads: int, length: int, key_dim: int, value_dim: int, itemsize: int, interpret: bool):
  """The kernel for [H, T, d] arrays, forward and fused backward."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
  block, wide = kernel_blocks(length, key_dim, value_dim, itemsize)
  sizes = splash.splash_attention_kernel.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=wide,
    block_kv_dkv_compute=block, use_fused_bwd_kernel=True)
  mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
  with jax.ensure_compile_time_eval():  # its tables of blocks are constants, whoever traces first
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _kernel(layout, query, key, value, segments, interpret: bool = False):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
  length = query.shape[1]
  if pad := -length % (LONG_UNIT if length > LONG else KERNEL_UNIT):  # padding attends within itself, and is cut off
    query, key, value = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))) for a in (query, key, value))
    segments = jnp.pad(segments, ((0, 0), (0, pad)))

  def local(q, k, v, segments):
    kernel = _splash(q.shape[2], q.shape[1], q.shape[3], v.shape[3], q.dtype.itemsize, interpret)

    def one(q, k, v, segments):
      q, k, v = (a.swapaxes(0, 1) for a in (q, k, v))
      return kernel(q, k, v, splash.SegmentIds(segments, segments)).swapaxes(0, 1)
    return jax.vmap(one)(q, k, v, segments)
  heads, rows = layout.spec('batch', None, 'head_work', None), layout.spec('batch', None)
  run = jax.shard_map(local, mesh=layout.mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
  return run(query, key, value, segments)[:, :length]
