"""Whether math-verify's reading of an answer equals that of a reference. For workers: sympy may hang.

math-verify rounds: decimals to six places, differences under 1e-15 to nothing. So 1.7e-19 would be 1.6e-19 and
0.333333 would be 1/3. Here decimals are read as the fractions that they are, and values are compared to 50 digits.
"""

import sympy
from math_verify import verify

_DIGITS = 50
# A program's decimal of an irrational number has 16 digits, of which it may lose two.
_DOUBLE = 1e-14


def same(wanted, given) -> bool:
  """Not symmetric: `x = 5` answers what asks for 5. Raises what sympy raises where two things cannot be compared."""
  wanted, given = exact(wanted), exact(given)
  if _is_inequality(wanted) and isinstance(given, (sympy.FiniteSet, sympy.Tuple)):
    return False  # `3, 4` is no answer to 3 < x < 4, though it is one to the point (3, 4)
  given = _as_vector(given, wanted)
  # raise_on_error: out of memory and stack can be told from "not equal".
  return verify(wanted, given, numeric_precision=_DIGITS, allow_set_relation_comp=True, timeout_seconds=None,
                raise_on_error=True) or _is_decimal_of(wanted, given)


def exact(reading):
  """Decimals as fractions, i as the imaginary unit; lists keep their order."""
  if isinstance(reading, sympy.MatrixBase):
    return reading.applyfunc(exact)
  if isinstance(reading, sympy.Float):
    return sympy.Rational(str(reading))
  if isinstance(reading, sympy.Symbol):
    return sympy.I if reading.name == 'i' else reading
  if not isinstance(reading, sympy.Basic) or reading.has(sympy.Sum, sympy.Product, sympy.Integral):
    return reading
  if not reading.atoms(sympy.Float) and not any(symbol.name == 'i' for symbol in reading.atoms(sympy.Symbol)):
    return reading
  return reading.func(*map(exact, getattr(reading, '_unsorted_args', reading.args)))


def union(readings: list):
  """One set for inequalities of which one must hold, `x < 1 or x > 3`; the reading itself if it is something else."""
  parts = readings[0].args if len(readings) == 1 and isinstance(readings[0], sympy.FiniteSet) else ()
  if not parts or not all(map(_is_inequality, parts)) or len(readings[0].free_symbols) != 1:
    return readings
  return [sympy.Union(*(part.as_set() for part in parts))]


def _is_inequality(reading) -> bool:
  parts = reading.args if isinstance(reading, sympy.And) else (reading,)
  return bool(parts) and all(isinstance(part, sympy.core.relational._Inequality) for part in parts)


def _as_vector(given, wanted):
  """A row or column as a tuple if the other is none; a tuple as a row or column if the other is one."""
  if isinstance(given, sympy.MatrixBase) and 1 in given.shape and isinstance(wanted, (sympy.Tuple, sympy.Interval)):
    return sympy.Tuple(*given.flat())
  if isinstance(wanted, sympy.MatrixBase) and 1 in wanted.shape:
    if isinstance(given, sympy.Interval) and given.is_open:
      given = sympy.Tuple(given.start, given.end)
    if isinstance(given, sympy.Tuple) and len(given) == len(wanted):
      return type(wanted)(*wanted.shape, list(given))
  return given


def _is_decimal_of(wanted, given) -> bool:
  """Whether one is a fraction and the other the irrational number that it stands for in a computer."""
  numbers = isinstance(wanted, sympy.Expr) and isinstance(given, sympy.Expr) and wanted.is_number and given.is_number
  if not numbers or wanted.has(sympy.UnevaluatedExpr) or given.has(sympy.UnevaluatedExpr):
    return False
  wanted, given = wanted.doit(), given.doit()
  if isinstance(wanted, sympy.Rational) == isinstance(given, sympy.Rational):
    return False
  scale = abs(sympy.N(wanted, _DIGITS))
  return bool(abs(sympy.N(wanted - given, _DIGITS)) <= _DOUBLE * scale)
