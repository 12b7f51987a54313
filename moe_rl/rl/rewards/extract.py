r"""Where in a response its answer stands.

The order, the first that is there counts:

  1. the last complete `<answer>…</answer>`;
  2. none, if thinking began (`<think>`) and never ended: a truncated response has no answer;
  3. after the last `</think>` (or in the whole text, if there is none), the last `\boxed{…}`; a last box that is never
     closed is a truncated answer, hence none;
  4. there, what follows the last `answer is`, `Answer:`, `####`, `答案是` …, to the end of its clause;
  5. the text itself, if it is short and hardly any of it is prose: a bare answer;
  6. the last formula between math delimiters or the last number, whichever comes later.

Rules that demand the tags (`integer`, `countdown`) use step 1 alone. Regular expressions here take linear time, or
look at the last `_TAIL_CHARS` characters only; nothing raises.
"""

import collections
import re

TAGS = ('<think>', '</think>', '<answer>', '</answer>')

# A final statement is looked for in so many characters at the end of a response: several pages.
_TAIL_CHARS = 8_000
# Longer texts, or those with more words, are prose about an answer rather than an answer.
_MAX_BARE_CHARS, _MAX_BARE_WORDS = 500, 3

_BOX = re.compile(r'\\(?:boxed|fbox)\s*\{')
_MACRO = re.compile(r'\\[A-Za-z]+')
_TEXT = re.compile(r'\\(?:text|textbf|textrm|mathrm|mbox|operatorname)\s*\{[^{}]*\}')
_WORD = re.compile(r'[A-Za-z]{3,}')
# $…$ as people type it: no space inside next to either sign and no digit after, so that prices are no formulas.
_FORMULA = re.compile(
    r'\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)'
    r'|(?<![\\$])\$(?![\s$])((?:[^$\\]|\\.)*?(?:[^$\s\\]|\\.))\$(?!\d)', re.DOTALL)
# 总共有 42 元: characters before the only number.
_CHINESE_PROSE = re.compile(r'(?:[\u4e00-\u9fff，：]\s?){2,}\$?-?\d[\d.,/]*\$?\s?[\u4e00-\u9fff]{0,6}。?$')
_DIGITS = r'(?:\d+(?:(?:,(?:\\!)?|\{,\})\d{3})*(?:\.\d+)?|\.\d+)'
_PART = r'\s*(?:\{\s*\d+\s*\}|\d)'
_NUMBER = re.compile(
    rf'(?<![\w.])(?:[-+\u2212]\s?(?=\\)|[-+\u2212])?(?:\\?\$)?'
    rf'(?:(?:\d+\s?)?\\[dtc]?frac{_PART}{_PART}|{_DIGITS}(?:\s?/\s?\d+)?)(?:\s?\\?%)?')
_SAYS = r'(?:(?:is|are|was|be|=|:|：|equals|should be|comes out to|must be|to the (?:question|problem))[*_\s]*)+'
_PHRASE = re.compile(rf'####|(?:答案|最终结果)(?:是|为|為|：|:)|\banswers?\b[*_ ]*(?:\s*{_SAYS}|\n)', re.IGNORECASE)
_WEAK_PHRASE = re.compile(
    r'\b(?:results?|solutions?|values?|total)\b[^.\n$=:]{0,40}?\s(?:is|are|=|equals)\s', re.IGNORECASE)
_CLAUSE_END = re.compile(r'[.;!?。；](?=\s|$|\*)|\n|,?\s(?:because|since|which|so)\b')
_JOINT = re.compile(r'\s*(?:,|;|,?\s*and\b|,?\s*or\b)\s*')
_MARKDOWN = '*_ \t\r\n'


def format_reward(response: str) -> float:
  """1.0 for `<think>…</think> <answer>…</answer>` and nothing else, otherwise 0.0.

  Each tag exactly once and in this order; only whitespace before, between and after the two blocks. What the
  blocks hold is free, also nothing. Linear time, never raises. DeepSeek-R1 (arXiv:2501.12948) sec. 2.2.2.
  """
  text = response.strip()
  if any(text.count(tag) != 1 for tag in TAGS):
    return 0.0
  if not (text.startswith(TAGS[0]) and text.endswith(TAGS[3])):
    return 0.0
  thought_end = text.index(TAGS[1])
  between = text[thought_end + len(TAGS[1]):text.index(TAGS[2])]
  in_order = thought_end < text.index(TAGS[2])
  return 1.0 if in_order and not between.strip() else 0.0


def tagged_answer(response: str) -> str | None:
  """Stripped content of the last complete `<answer>…</answer>`; None when there is none. Linear time."""
  last_end = response.rfind(TAGS[3])
  start = response.rfind(TAGS[2], 0, max(last_end, 0))
  if start < 0:
    return None
  start += len(TAGS[2])
  return response[start:response.index(TAGS[3], start)].strip()


def thinking(response: str) -> str:
  """What stands before the last `</think>`; the whole response, if thinking never ended; else nothing."""
  before, end, _ = response.rpartition(TAGS[1])
  text = before if end else response if TAGS[0] in response else ''
  return text.replace(TAGS[0], ' ').strip()


def conclusion(response: str) -> str | None:
  """What stands after the last `</think>`; the response itself if it has no thinking; None if that never ended."""
  _, end, rest = response.rpartition(TAGS[1])
  return None if not end and TAGS[0] in response else rest


def summary(response: str) -> str:
  """What a reader is told in the end: the tagged answer, else what follows the thinking; '' if that never ended."""
  tagged = tagged_answer(response)
  return (conclusion(response) or '').strip() if tagged is None else tagged


def last_boxed(text: str) -> str | None:
  r"""Content of the last \boxed{...}, None if there is none or it has no end; \{ and \} are no braces."""
  start = max((match.end() for match in _BOX.finditer(text)), default=None)
  depth = 1
  for token in re.finditer(r'\\.|[{}]', text[start:] if start else '', re.DOTALL):
    depth += {'{': 1, '}': -1}.get(token.group(), 0)
    if depth == 0:
      return text[start:start + token.start()].strip()
  return None


def final_answer(response: str) -> str | None:
  """The answer by the order above; None when there is none."""
  tagged = tagged_answer(response)
  if tagged is not None:
    return _of_statement(tagged) or tagged
  text = conclusion(response)
  return None if text is None else _of_prose(text)


def _of_statement(text: str) -> str | None:
  """What a tagged `The answer is …` says; None for anything else: tags hold answers, not the search for one."""
  if len(text) > _TAIL_CHARS or _BOX.search(text) or len(_PHRASE.findall(text)) != 1:
    return None
  return _stated(text)


def _of_prose(text: str) -> str | None:
  if _BOX.search(text):
    return last_boxed(text)
  text = text.strip()
  return _stated(text[-_TAIL_CHARS:]) or (text if is_bare(text) else _last_formula_or_number(text[-_TAIL_CHARS:]))


def last_statement(text: str) -> str | None:
  """The line that follows the last `answer is`; None without one, or if nothing follows."""
  found = _last(_PHRASE, text[-_TAIL_CHARS:])
  rest = text[-_TAIL_CHARS:][found.end():].lstrip(_MARKDOWN + ':=：') if found else ''
  return rest.split('\n', 1)[0].strip(_MARKDOWN) or None


def is_bare(text: str) -> bool:
  """Whether a text is short and hardly any of it is prose."""
  if len(text) > _MAX_BARE_CHARS:
    return not any(char.isspace() for char in text)  # endless, but one thing
  words = _WORD.findall(_MACRO.sub(' ', _TEXT.sub(' ', text)))
  return bool(text) and len(words) <= _MAX_BARE_WORDS and not _CHINESE_PROSE.match(text)


def _stated(text: str) -> str | None:
  """What follows the last `answer is`, or a closing `the result is`; None without one, or if nothing follows."""
  found = _last(_PHRASE, text)
  if found is None:
    found = _last(_WEAK_PHRASE, text)
    if found is None or re.search(r'\w', ''.join(_CLAUSE_END.split(text[found.end():], maxsplit=1)[1:])):
      return None
  rest = text[found.end():].lstrip(_MARKDOWN + ':=：')
  formula = _FORMULA.match(rest)
  if formula:
    return _formulas_from(rest, formula)
  clause = _CLAUSE_END.split(rest, maxsplit=1)[0].strip(_MARKDOWN + ',:')
  if not clause or is_bare(clause):
    return clause or None
  inside = _FORMULA.search(clause)
  if inside:
    return _formulas_from(clause, inside)
  number = _NUMBER.search(clause)
  return number.group() if number else clause


def _formulas_from(text: str, first: re.Match) -> str:
  """`$1$, $2$ and $3$` -> `1, 2, 3`; a single formula keeps what follows it directly: `$18$ eggs` is `18 eggs`."""
  chain = _chains(text[first.start():])[0]
  end = first.start() + chain[-1].end()
  tail = _CLAUSE_END.split(text[end:], maxsplit=1)[0].strip(_MARKDOWN + ',:')
  keeps = len(chain) == 1 and re.fullmatch(r'\\?%|[A-Za-z /]{2,40}', tail) and len(tail.split()) <= 3
  return _listed(chain) + (f' {tail}' if keeps else '')


def _chains(text: str) -> list[list[re.Match]]:
  """The formulas of a text, those together that are joined by commas, `and` or `or`."""
  chains = []
  for formula in _FORMULA.finditer(text):
    if chains and _JOINT.fullmatch(text, chains[-1][-1].end(), formula.start()):
      chains[-1].append(formula)
    else:
      chains.append([formula])
  return chains


def listed_formulas(text: str) -> str | None:
  """`$1$, $2$ and $3$` -> `1, 2, 3`; None if there are fewer than two, or they are not joined."""
  chains = _chains(text)
  return _listed(chains[0]) if len(chains) == 1 and len(chains[0]) > 1 else None


def _listed(chain: list[re.Match]) -> str:
  return ', '.join(next(group for group in formula.groups() if group is not None).strip().rstrip('.,;')
                   for formula in chain)


def _last_formula_or_number(text: str) -> str | None:
  chains, number = _chains(text), _last(_NUMBER, text)
  if chains and (number is None or number.start() < chains[-1][-1].end()):
    return _listed(chains[-1])
  return number.group().strip() if number else None


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
  return next(iter(collections.deque(pattern.finditer(text), maxlen=1)), None)
