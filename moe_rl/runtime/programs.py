"""What a stage runs on the devices, listed: jitted programs with abstract arguments, ready to be compiled anywhere.

Loops whose length is data stand in a `jax.named_scope` of one of `LOOPS`, so that a compiled program says which is
which, and a plan can count each by its own expected rounds.
"""

import dataclasses
from collections.abc import Callable

DECODING = 'decode'  # a token of every response a round
MICROBATCHES = 'microbatches'  # of an update
EXCHANGES = 'exchanges'  # of tokens with the experts' devices; further rounds are for what overflows a buffer
PARTS = 'parts'  # of what a round has brought
LOOPS = (DECODING, MICROBATCHES, EXCHANGES, PARTS)


@dataclasses.dataclass(frozen=True)
class Program:
  """name: for people; function: jitted; arguments: ShapeDtypeStructs with shardings, or static values."""

  name: str
  function: Callable
  arguments: tuple

  def lower(self):
    return self.function.lower(*self.arguments)
