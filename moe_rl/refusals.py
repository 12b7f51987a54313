"""How bad input is refused: one message, for a person."""

import difflib


def refuse(bad, message: str):
  """Raises ValueError with `message` if bad."""
  if bad:
    raise ValueError(message)


def choose(key: str, value: str, options: tuple[str, ...]):
  if value not in options:
    near = difflib.get_close_matches(str(value), options, 1)
    raise ValueError(f"{key} '{value}': use one of {', '.join(options)}" + (f" (nearest: '{near[0]}')" if near else ''))


def positive(section: str, values, keys: tuple[str, ...]):
  for key in keys:
    refuse(values[key] <= 0, f'{section}.{key} is {values[key]}, must be positive')


def divides(key: str, value: int, other: str, by: int):
  if value % by:
    down = value // by * by
    near = f'{down} or {down + by}' if down else f'{by}'
    refuse(True, f'{key} {value} is not a multiple of {other} {by}: set it to {near}')
