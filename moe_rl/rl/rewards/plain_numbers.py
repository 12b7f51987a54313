r"""Reads one plain number out of an answer, exactly: `18`, `$1,450.50`, `\frac{3}{4}`, `50%`, `18 dollars`.

Most answers to word problems are plain numbers. Reading them here costs microseconds instead of the 20
milliseconds of math-verify, and compares exactly. What is not surely one number is None, and left to
math-verify. All functions take linear time and raise nothing.
"""

import fractions
import re
from typing import NamedTuple

from moe_rl.rl.rewards import spellings

# Longest text that is tried as one plain number; also far from int()'s limit of 4,300 digits.
_MAX_NUMBER_CHARS = 200


class Number(NamedTuple):
  """A number as written and what a % or 'dozen' after it may mean: `50%` is value 50, scale 1/100."""
  value: fractions.Fraction
  scale: fractions.Fraction

  def same(self, other: 'Number') -> bool:
    """Exact. A sign such as % may be left out: 50% is 50 (asked in percent) and 0.5, but 50% is not 0.5%."""
    if self.value == other.value:
      return True
    return self.scale != other.scale and self.value * self.scale == other.value * other.scale


INTEGER = re.compile(r'([+-]?)(\d{1,3}(?:,\d{3})+|\d+)', re.ASCII)
_PLAIN = re.compile(
    r'(?P<sign>[+-]?) ?\$? ?(?P<inner>[+-]?) ?'
    r'(?:(?P<ones>\d+)? ?\\frac ?\{ ?(?P<num>\d+) ?\} ?\{ ?(?P<den>\d+) ?\}'
    r'|(?:(?P<some>\d+) )?(?P<whole>\d{1,3}(?:,\d{3})+|\d+) ?/ ?(?P<under>\d+)'
    r'|(?P<decimal>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+))'
    r'(?P<tail>(?: ?[%$]| ?(?:\u00b0|\^ ?(?:\\circ|\{ ?\\circ ?\})) ?[CF]?|[ \u4e00-\u9fff].*)?)', re.ASCII)
_DEGREES = re.compile(r'(?:\u00b0|\^ ?(?:\\circ|\{ ?\\circ ?\})) ?[CF]?')
_UNIT = re.compile(r'[A-Za-z]{2,}(?:[ /-][A-Za-z]{2,}){0,5}(?: ?\^ ?\{?[23]\}?)?'
                   r'|(?:(?![万亿千百十半分倍点又])[\u4e00-\u9fff]){1,6}')
_MAYBE_SCALES = {'percent': fractions.Fraction(1, 100), 'dozen': fractions.Fraction(12)}
_SCALES = {'hundred': 10**2, 'thousand': 10**3, 'million': 10**6, 'billion': 10**9, 'trillion': 10**12}
# After a number these words make another number of it, so they are no units.
NOT_UNITS = frozenset(
    word for line in (
        'and or to not plus minus times over divided mod pi tau sqrt root power squared cubed factorial',
        'point half halves third thirds fourth fourths fifth fifths sixth sixths seventh sevenths eighth',
        'eighths ninth ninths tenth tenths hundredth hundredths sin cos tan log ln exp infinity',
    ) for word in line.split()).union(_SCALES)

# Words before a bare answer that say nothing: `Thus x = 5`, `So we get (1, 2)`.
_LEAD = re.compile(
    r'(?:(?:so|thus|hence|therefore|finally|we|you|get|have|find|obtain|then|it|that|this|is|are|must be|equals|'
    r'equal to|the (?:value|number|result|sum|total|solution|solutions|final answer|answer))\b[,:]?\s+)+',
    re.IGNORECASE)
_STOPS = '.;,。；， \\'  # after an answer they say nothing, nor does a backslash alone
_WRAPPED = (('$$', '$$'), ('$', '$'), ('\\(', '\\)'), ('\\[', '\\]'), ('**', '**'), ('*', '*'), ('`', '`'))
_SPELLINGS = (
    ('\u2212', '-'), ('\\$', '$'), ('€', '$'), ('£', '$'), ('¥', '$'), ('\\%', '%'), ('{,}', ','), ('\\!', ''),
    ('\\,', ' '), ('\\;', ' '), ('\\ ', ' '), ('~', ' '),
    ('\\dfrac', '\\frac'), ('\\tfrac', '\\frac'), ('\\cfrac', '\\frac'), ('\\left', ''), ('\\right', ''),
)
_THOUSANDS = re.compile(r'(?<=\d)(?:\\,|\u2009|\u202f)(?=\d{3}(?!\d))')  # 1\,000
_STYLE = re.compile(r'\\(?:bf|rm|it|displaystyle|textstyle)(?![A-Za-z])')
_SHORT_FRACTION = re.compile(r'\\frac ?(?:(\d)|\{ ?(\d+) ?\}) ?(?:(\d)|\{ ?(\d+) ?\})')  # \frac34
TEXT_MACRO = re.compile(r'\\(?:text|textbf|textrm|mathrm|mbox)\{([^{}]*)\}')


def unbox(text: str) -> str:
  r"""Content of the only `\boxed{…}`; the text itself if there is none, more than one, or an open brace."""
  head, box, rest = text.partition('\\boxed{')
  if not box or '\\boxed{' in rest:
    return text
  depth = 1
  for i, char in enumerate(rest):
    depth += (char == '{') - (char == '}')
    if depth == 0:
      return rest[:i].strip()
  return text


def canonical_integer(text: str) -> str | None:
  """`-0,012` -> `-12`, as text: no limit on digits, no conversion cost. None when it is not one integer."""
  match = INTEGER.fullmatch(text.strip())
  if match is None:
    return None
  digits = match[2].replace(',', '').lstrip('0') or '0'
  return f'-{digits}' if match[1] == '-' and digits != '0' else digits


def without_lead(text: str) -> str:
  """The text without introducing words such as `So we get`."""
  lead = _LEAD.match(text)
  return text[lead.end():] if lead and lead.end() < len(text) else text


def tidy(text: str) -> str:
  r"""One spelling for what means the same: math delimiters, spaces, `\text{}`, `\dfrac`, a last full stop."""
  text = _STYLE.sub(' ', TEXT_MACRO.sub(r' \1 ', _THOUSANDS.sub('', text)))
  for old, new in _SPELLINGS:
    text = text.replace(old, new)
  text = _SHORT_FRACTION.sub(lambda m: rf'\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}', text)
  text = ' '.join(text.split()).rstrip(_STOPS)
  for left, right in _WRAPPED:
    inner = text[len(left):len(text) - len(right)]
    if inner and text.startswith(left) and text.endswith(right) and left not in inner:
      text = inner.strip().rstrip(_STOPS)
  return text


def _magnitude(match: re.Match) -> fractions.Fraction | None:
  """The matched number without its sign; None for a zero denominator."""
  top, bottom = match['num'] or match['whole'], match['den'] or match['under']
  if top is None:
    return fractions.Fraction(match['decimal'].replace(',', '').removesuffix('.'))
  if int(bottom) == 0:
    return None
  ones = int(match['ones'] or match['some'] or 0)  # of a mixed number
  return ones + fractions.Fraction(int(top.replace(',', '')), int(bottom))


def _read_tail(tail: str) -> tuple[int, fractions.Fraction] | None:
  """What follows a number, as (certain factor, possible scale); None when it is no unit."""
  if tail in ('', '%', '$') or _DEGREES.fullmatch(tail):
    return 1, fractions.Fraction(1, 100 if tail == '%' else 1)
  if not _UNIT.fullmatch(tail):
    return None
  words = re.findall('[A-Za-z]+', tail.lower()) or [tail]
  if NOT_UNITS.intersection(words[1:]) or words[0] in NOT_UNITS.difference(_SCALES):
    return None
  return _SCALES.get(words[0], 1), _MAYBE_SCALES.get(words[0], fractions.Fraction(1))


def read(text: str, units: bool) -> Number | None:
  r"""Reads `18`, `-1,450.5`, `$3`, `3/4`, `1\frac34`, `0.\overline{3}`, `50%`; with `units` also `18 eggs`, `18°`; else
  None."""
  if len(text) > _MAX_NUMBER_CHARS:
    return None
  match = _PLAIN.fullmatch(tidy(spellings.repeating(text)))
  if match is None or (match['sign'] and match['inner']):
    return None
  tail = match['tail'].strip()
  meaning = _read_tail(tail) if units or tail in ('', '%') else None
  magnitude = _magnitude(match)
  if meaning is None or magnitude is None:
    return None
  factor, scale = meaning
  return Number(magnitude * (-factor if '-' in (match['sign'], match['inner']) else factor), scale)
