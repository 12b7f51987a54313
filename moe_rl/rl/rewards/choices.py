"""Multiple choice and exact match.

A choice's reference is its letter, or JSON `{"answer": "C", "choices": ["…", …]}`: then the text of a choice is as good
as its letter, if no other choice has the same.
"""

import json
import re

from moe_rl.rl.rewards import extract, plain_numbers
from moe_rl.rl.rewards.verdicts import CORRECT, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, WRONG

_MAX_CHARS = 10_000
_MACROS = re.compile(r'\\(?:text|textbf|mathrm|mathbf|rm|bf)\b|[${}\\*_`"\']')
_LETTER = re.compile(r'\(?([A-Z])\)?(?:$|[).:,]|\s*(?:-|–)(?:\s|$))')
_SEVERAL = re.compile(r'\(?[A-Z]\)?(?:(?:[\s,/&]|\bor\b|\band\b)+\(?[A-Z]\)?)+\W*')  # no answer: which of them?
_NAMED = re.compile(
    r'(?:(?:option|choice|letter)s?(?: is|:)?\s*|选(?:项|择)?(?:是|：|:)?\s*)\(?([A-Z])\b\)?', re.IGNORECASE)
_REASON = re.compile(r',?\s(?:because|since|as|for)\s.*', re.DOTALL)
_LAST = re.compile(r'\(([A-Z])\)|\b([B-HJ-Z])\b(?=[\s.)]*$)|^\W*([A-Z])\W*$', re.MULTILINE)


def read_reference(reference: str) -> tuple[str, list[str]] | None:
  """(letter, texts of the choices, none if not given); None when it is neither of the two forms."""
  text = reference.strip()
  if re.fullmatch(r'\(?[A-Za-z]\)?\.?', text):
    return text.strip('().').upper(), []
  try:
    fields = json.loads(text)
    letter, texts = fields['answer'], fields.get('choices', [])
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return None
  good = isinstance(letter, str) and re.fullmatch('[A-Z]', letter) and isinstance(texts, list) and all(
      isinstance(text, str) for text in texts) and (not texts or ord(letter) - 65 < len(texts))
  return (letter, texts) if good else None


def find_choice(response: str) -> str | None:
  """The answer: what the tags hold, or what is boxed or said to be the answer; without tags then a short text, and
  then the last letter that stands for a choice. None if thinking never ended."""
  tagged = extract.tagged_answer(response)
  text = extract.conclusion(response) if tagged is None else tagged
  if text is None:
    return None
  text = text.strip()
  if tagged is not None and _LETTER.match(text):
    return text
  found = extract.last_boxed(text) or extract.last_statement(text)
  if found or tagged is not None or extract.is_bare(text):
    return found or text
  letters = _LAST.findall(text[-2000:])
  return next(filter(None, letters[-1])) if letters else text[-500:]


def choice(answer: str, reference: str) -> str:
  """Verdict for a letter, `(C)`, `C) 18`, `option C`, `\\boxed{\\text{C}}`, or the text of a choice."""
  wanted = read_reference(reference)
  if wanted is None:
    return UNPARSABLE_REFERENCE
  if len(answer) > _MAX_CHARS:
    return UNPARSABLE_ANSWER
  given = letter(answer, reference)
  if given is None:
    return UNPARSABLE_ANSWER
  return CORRECT if given == wanted[0] else WRONG


def letter(answer: str, reference: str) -> str | None:
  """The letter that an answer to a readable reference's question means, None if it means none."""
  return _letter_of(plain_numbers.unbox(answer), read_reference(reference)[1])


def _letter_of(answer: str, texts: list[str]) -> str | None:
  bare = ' '.join(_MACROS.sub(' ', answer).split())
  if re.fullmatch(r'\(?[A-Z][).]*', bare):  # a letter is one, even where it is also the text of another choice
    return bare.strip('().')
  bare = _REASON.sub('', bare)
  same = [i for i, text in enumerate(texts) if _squeezed(text) == _squeezed(answer)]
  if len(same) == 1:
    return chr(65 + same[0])
  match = _LETTER.match(bare) or re.fullmatch(r'\(?([a-z])\)?\.?', bare)
  if match is None:
    match = _NAMED.search(bare) if len(_NAMED.findall(bare)) == 1 else None
  elif _SEVERAL.fullmatch(bare):
    return match[1] if _squeezed(answer) in [_squeezed(f'{match[0]} {text}') for text in texts] else None
  return match and match[1].upper()


def _squeezed(text: str) -> str:
  return ' '.join(plain_numbers.tidy(text).split()).rstrip('.').casefold()


def exact(answer: str, reference: str) -> str:
  """Verdict for text that must be the same, runs of white space aside."""
  if not reference.strip():
    return UNPARSABLE_REFERENCE
  if not answer.strip() or len(answer) > max(_MAX_CHARS, 2 * len(reference)):
    return UNPARSABLE_ANSWER
  return CORRECT if answer.split() == reference.split() else WRONG
