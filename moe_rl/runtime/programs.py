"""What a stage runs on the devices, listed: jitted programs with abstract arguments, ready to be compiled anywhere."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Program:
  """name: for people; function: jitted; arguments: ShapeDtypeStructs with shardings, or static values."""

  name: str
  function: Callable
  arguments: tuple

  def lower(self):
    return self.function.lower(*self.arguments)
