r"""From mathematics as people and programs type it to LaTeX that math-verify reads: `2√3`, `sqrt(3)/2`, `1.5e3`, `½`.

Every rule is a linear substitution, and leaves LaTeX as it is.
"""

import re

_SYMBOLS = {
    '√': r'\sqrt', 'π': r'\pi ', '∞': r'\infty ', '×': r'\times ', '·': r'\cdot ', '⋅': r'\cdot ', '÷': '/',
    '≤': r'\le ', '≥': r'\ge ', '≠': r'\ne ', '±': r'\pm ', '∈': r'\in ', '∪': r'\cup ', '∩': r'\cap ', '−': '-',
    '∅': r'\emptyset ', '°': r'^\circ ', '–': '-', '，': ',', '（': '(', '）': ')', '＝': '=', '：': ':',
    '⟨': '(', '⟩': ')',
    '½': r'\frac{1}{2}', '⅓': r'\frac{1}{3}', '⅔': r'\frac{2}{3}', '¼': r'\frac{1}{4}', '¾': r'\frac{3}{4}',
    'θ': r'\theta ', 'α': r'\alpha ', 'β': r'\beta ',
}  # fmt: skip
_TABLE = str.maketrans(_SYMBOLS)
_RAISED = dict(zip('⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ', '0123456789-n', strict=True))
_LOWERED = dict(zip('₀₁₂₃₄₅₆₇₈₉', '0123456789', strict=True))
_RAISED_RUN, _LOWERED_RUN = (re.compile(f'[{"".join(table)}]+') for table in (_RAISED, _LOWERED))
_ARGUMENT = r'(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]\b))'
_RULES = tuple((re.compile(pattern), new) for pattern, new in (
    (r'\*\* *\(([^()]*)\)', r'^{\1}'),  # x**(1/2) as programs write it
    (r'\*\* *(-?\w+)', r'^{\1}'),
    (r'(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.])', r'\1 \\times 10^{\2}'),
    (r'(?<![\w.])(\d+) (\d+)/(\d+)(?![\w.])', r'\1\\frac{\2}{\3}'),  # 1 1/2
    (rf'(?:\\sqrt|(?<![\\A-Za-z])sqrt) *{_ARGUMENT}', r'\\sqrt{\1\2}'),
    (r'(?<![\\A-Za-z])(pi|theta|alpha|beta)(?![A-Za-z])', r'\\\1 '),
    (r'(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp)(?![A-Za-z])', r'\\\1 '),
    (r'(?<![\\A-Za-z])(?:inf|infty|infinity|oo)(?![A-Za-z])', r'\\infty '),
    (r' *\bbase (\d{1,2})\b', r'_{\1}'),
    (r'\\phantom *(?:\{[^{}]*\}|\\?[\w-])', ''),
    (r'\\(?:frac|dfrac|tfrac) *(\\[A-Za-z]+|\d) *(\d|[A-Za-z]|\\(?!frac|sqrt)[A-Za-z]+)', r'\\frac{\1}{\2}'),
    (r'^ *(?:\\approx|\\sim|\\simeq|≈|=) *', ''),
    (r'≈', r'\\approx '),
    (r'\\langle(?![A-Za-z])', '('), (r'\\rangle(?![A-Za-z])', ')'),
    (r'\\(?:bf|rm|it|displaystyle|textstyle)(?![A-Za-z])', ' '),
))  # fmt: skip
_REPEATING = re.compile(r'(\d*)\.(\d*)(?:\\overline *\{(\d+)\}|\((\d+)\))')
_DOT = r'\\dot *(?:\{ *(\d) *\}|(\d))'
_DOTS = re.compile(rf'(?<=[.\d]){_DOT}(?:(\d*){_DOT})?')  # over the first and the last digit of the period
_CASES = re.compile(r'\\begin *\{cases\}([^&]*?)\\end *\{cases\}')


def to_latex(text: str) -> str:
  """The text with common other spellings of mathematics replaced by LaTeX."""
  text = _RAISED_RUN.sub(lambda run: '^{' + ''.join(_RAISED[c] for c in run.group()) + '}', text)
  text = _LOWERED_RUN.sub(lambda run: '_{' + ''.join(_LOWERED[c] for c in run.group()) + '}', text)
  text = text.translate(_TABLE)
  for pattern, new in _RULES:
    text = pattern.sub(new, text)
  return repeating(_CASES.sub(lambda system: system[1].replace('\\\\', ', '), text))


def repeating(text: str) -> str:
  r"""`0.1\overline{6}`, `0.1\dot6` and `0.1(6)` -> `\frac{15}{90}`; a long text as it is."""
  if len(text) > 200 or '.' not in text:
    return text
  text = _DOTS.sub(lambda dots: rf'\overline{{{"".join(group or "" for group in dots.groups())}}}', text)
  return _REPEATING.sub(_fraction, text)


def _fraction(match: re.Match) -> str:
  whole, fixed, *periods = match.groups()
  period = periods[0] or periods[1]
  top = int((whole or '0') + fixed + period) - int((whole or '0') + fixed)
  return rf'\frac{{{top}}}{{{"9" * len(period) + "0" * len(fixed)}}}'
