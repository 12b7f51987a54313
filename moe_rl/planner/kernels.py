"""FLOPs of kernels that give the compiler no estimate: the fused causal attention that ships with JAX."""

import math
import re

from moe_rl.planner.hlo import Computation, Instruction

# Widths of keys and of values in a pair of tokens' products: scores and output; scores again, and the gradients of the
# scores, of queries, of keys and of values.
PRODUCTS = {'fwd': (1, 1), 'dkv': (3, 2)}


def attention_flops(computation: Computation, i: Instruction) -> float | None:
  """FLOPs of a call of the splash kernel, or None if `i` is none. Blocks that nobody may see are skipped."""
  found = re.match(r'splash_m[hq]a_(fwd|dkv)', i.name)
  if not found:
    return None
  part = found.group(1)
  query, _, value = (computation.operand(i, n).shapes[0].dims for n in (2, 3, 4))
  suffix = '' if part == 'fwd' else '_dkv'
  rows, columns = (int(re.search(rf'block_{of}{suffix}\W+(\d+)', i.attributes).group(1)) for of in ('q', 'kv'))
  length = query[-2]
  pairs = rows * columns * sum(-(-min(end, length) // columns) for end in range(rows, length + rows, rows))
  keys, values = PRODUCTS[part]
  return 2.0 * math.prod(query[:-2]) * pairs * (keys * query[-1] + values * value[-1])
