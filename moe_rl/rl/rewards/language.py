r"""Language consistency: the share of a text's words that are in the target language.

DeepSeek-R1 (arXiv:2501.12948) sec. 2.3.2 takes "the proportion of target language words in the CoT". Here:

  what counts as a word   LaTeX, code, addresses, tags, numbers, single letters, short capitals (AB, GCD), names of
                          functions (sin, mod) and anything with a digit or an operator in it are nobody's language and
                          left out. Chinese, Japanese, Thai and their like are written without spaces: so many
                          characters are taken for a word, see `_CHARS_A_WORD`.
  whose it is             A word in a script that the target does not use is not of the target. Han is Japanese where
                          kana stand beside it, else Chinese. Where a script serves many languages (Latin, Cyrillic,
                          Arabic, Devanagari), py3langid tells them apart, at least eight words at a time; fewer go with
                          the rest of the text, and count for the target if nothing speaks against it.

Linear time, about 0.3 ms for a sentence. The model of py3langid (in the package, nothing is downloaded) is loaded at
the first text that needs it, in about a second.
"""

import functools
import re
import unicodedata

ENOUGH_WORDS = 8
_MOST_CHUNKS = 200  # longer texts are told in larger chunks
# Longer thinking is judged by its beginning and its end.
_MAX_CHARS = 100_000

_SCRIPTS = {
    'Han': '\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f',
    'Kana': '\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f', 'Hangul': '\uac00-\ud7af\u1100-\u11ff\u3130-\u318f',
    'Latin': 'A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff\u0300-\u036f',
    'Cyrillic': '\u0400-\u052f', 'Greek': '\u0370-\u03ff\u1f00-\u1fff', 'Hebrew': '\u0590-\u05ff',
    'Arabic': '\u0600-\u065f\u066e-\u06ef\u06fa-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff',
    'Devanagari': '\u0900-\u0965\u0970-\u097f', 'Bengali': '\u0980-\u09ff', 'Gurmukhi': '\u0a00-\u0a7f',
    'Gujarati': '\u0a80-\u0aff', 'Oriya': '\u0b00-\u0b7f', 'Tamil': '\u0b80-\u0bff', 'Telugu': '\u0c00-\u0c7f',
    'Kannada': '\u0c80-\u0cff', 'Malayalam': '\u0d00-\u0d7f', 'Sinhala': '\u0d80-\u0dff', 'Thai': '\u0e00-\u0e4f',
    'Lao': '\u0e80-\u0ecf', 'Tibetan': '\u0f00-\u0fff', 'Myanmar': '\u1000-\u109f', 'Armenian': '\u0530-\u058f',
    'Georgian': '\u10a0-\u10ff\u1c90-\u1cbf', 'Ethiopic': '\u1200-\u139f', 'Khmer': '\u1780-\u17ff',
}  # fmt: skip
_RUN = re.compile('|'.join(
    f"(?P<{name}>[{chars}](?:['’-]?[{chars}])*)" for name, chars in _SCRIPTS.items()) + r'|(?P<Other>[^\W\d_])')
# Characters to a word where no spaces are written: rounded from dictionaries of each language.
_CHARS_A_WORD = {
    'Han': 1.5, 'Kana': 2.0, 'Thai': 4.0, 'Lao': 4.0, 'Khmer': 4.0, 'Myanmar': 4.0, 'Tibetan': 3.0, 'Other': 1.0}
# Scripts of the languages that are not written in Latin letters.
_WRITTEN_IN = {
    'zh': ('Han',), 'ja': ('Han', 'Kana'), 'ko': ('Hangul',), 'el': ('Greek',), 'he': ('Hebrew',),
    **dict.fromkeys(('ru', 'uk', 'be', 'bg', 'mk', 'kk', 'ky', 'mn', 'tg', 'tt', 'ba'), ('Cyrillic',)),
    'sr': ('Cyrillic', 'Latin'), **dict.fromkeys(('ar', 'fa', 'ur', 'ps', 'ug'), ('Arabic',)),
    **dict.fromkeys(('hi', 'mr', 'ne', 'sa'), ('Devanagari',)), 'bn': ('Bengali',), 'as': ('Bengali',),
    'pa': ('Gurmukhi',), 'gu': ('Gujarati',), 'or': ('Oriya',), 'ta': ('Tamil',), 'te': ('Telugu',), 'kn': ('Kannada',),
    'ml': ('Malayalam',), 'si': ('Sinhala',), 'th': ('Thai',), 'lo': ('Lao',), 'bo': ('Tibetan',), 'my': ('Myanmar',),
    'ka': ('Georgian',), 'hy': ('Armenian',), 'am': ('Ethiopic',), 'km': ('Khmer',),
}  # fmt: skip
_LATIN = ('en de fr es pt it nl vi pl cs sk sl hr bs ro hu fi et lt lv sv no da is ga cy eu ca gl tr az uz id ms tl sw '
          'af sq mt eo la lb br fo jv rw xh zu ku').split()
_SHARED = {'Latin', 'Cyrillic', 'Arabic', 'Devanagari', 'Bengali'}  # by several languages
# What the model calls by other names, or tells apart where a reader need not.
_SAME = {'hi': {'sa'}, 'en': {'pcm'}, 'no': {'nn', 'da'}, 'da': {'no', 'nn'}, 'ar': {'arz', 'ary'}, 'ms': {'id'},
         'id': {'ms'}, 'uz': {'uzs'}, 'hr': {'bs', 'sr'}, 'bs': {'hr', 'sr'}, 'sr': {'hr', 'bs'}}  # fmt: skip

_NOBODYS = re.compile(
    r'```.*?(?:```|\Z)|\[asy\].*?(?:\[/asy\]|\Z)|`[^`\n]*`|\$\$.{0,1000}?\$\$|\\\[.{0,1000}?\\\]|\\\(.{0,300}?\\\)'
    r'|\\begin\{(\w+)\*?\}.{0,1000}?\\end\{\1\*?\}|(?<!\\)\$[^$\n]{1,300}?\$|</?\w+>|\b(?:https?://|www\.)\S+'
    r'|\\[A-Za-z]+(?:\{[^{}]*\})*', re.DOTALL)
# What stands between spaces or characters that need none; and what makes a symbol of it, its outer marks aside.
_TOKEN = re.compile(r'[^\s\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+')
_MARKS = '*_#"\'“”‘’(),.:;!?-—[]…'
_SYMBOL = re.compile(r'[\d_^=<>{}\\|@#&*+]|\w\(\w')
_NO_WORD = frozenset('sin cos tan cot sec csc log ln exp max min mod gcd lcm lim det dim arg sup inf deg'.split())
_SENTENCE_END = re.compile(r'[.!?;:。！？；：।؟\n]+')


def share(text: str, target: str) -> float:
  """Words of the target language over all words, 0 to 1; 1.0 for a text without words.

  target: ISO 639-1 code, such as `en` or `zh`. Raises ValueError for one that is not known.
  """
  check_target(target)
  scripts = _WRITTEN_IN.get(target, ('Latin',))
  total = certain = doubtful = 0.0
  votes = 0  # words in chunks that are the target's, less those in chunks that are not
  for words in _chunks(_clean(text), scripts):
    own = [(script, word) for script, word in words if script in scripts]
    weight = _weight(own)
    total += _weight(words)
    spoken = _is_spoken(words, own, target, weight)
    if spoken is None:
      doubtful += weight
    else:
      certain += weight * spoken
      votes += weight if spoken else -weight
  return (certain + doubtful * (votes >= 0)) / total if total else 1.0


def check_target(target: str) -> None:
  """Raises ValueError if it is no language that can be told."""
  if target not in known_targets():
    raise ValueError(f'language {target!r} is not known: use an ISO 639-1 code such as en, zh, de (one of '
                     f'{", ".join(sorted(known_targets()))})')


def known_targets() -> frozenset[str]:
  """Languages that `share` can tell, by their ISO 639-1 codes."""
  return frozenset((*_LATIN, *_WRITTEN_IN))


def needs_model(target: str) -> bool:
  """Whether the target shares its script with other languages."""
  return bool(_SHARED.intersection(_WRITTEN_IN.get(target, ('Latin',))))


def is_loaded() -> bool:
  """Whether the model of py3langid is in this process."""
  return load.cache_info().currsize > 0


@functools.lru_cache(maxsize=65536)
def of_question(text: str, default: str = 'en') -> str:
  """The language a question is asked in; `default` where it has too few words to tell, or one that is not known."""
  words = [word for chunk in _chunks(_clean(text), tuple(_SCRIPTS)) for word in chunk]
  weights = {name: _weight([word for word in words if word[0] == name]) for name in _SCRIPTS}
  script = max(weights, key=weights.get)
  if not weights[script]:
    return default
  if script in ('Han', 'Kana'):
    return 'ja' if _is_japanese(words) else 'zh'
  candidates = [code for code, used in _WRITTEN_IN.items() if used == (script,)]
  if len(candidates) == 1 and script not in _SHARED:
    return candidates[0]
  if weights[script] < ENOUGH_WORDS:
    return default
  named = _identify(' '.join(word for kind, word in words if kind == script))
  return named if named in known_targets() else default


def _clean(text: str) -> str:
  if len(text) > _MAX_CHARS:
    text = text[:_MAX_CHARS // 2] + '\n' + text[-_MAX_CHARS // 2:]
  text = unicodedata.normalize('NFC', text)
  return _TOKEN.sub(_unless_symbol, _NOBODYS.sub(' ', text))


def _unless_symbol(token: re.Match) -> str:
  return ' ' if _SYMBOL.search(token.group().strip(_MARKS)) else token.group()


def _words(text: str) -> list[tuple[str, str]]:
  """(script, word) of all that is a word in some language."""
  out = []
  for match in _RUN.finditer(text):
    script, word = match.lastgroup, match.group()
    if script in ('Latin', 'Greek', 'Cyrillic') and (
        len(word) < 2 or (len(word) < 5 and word.isupper()) or word.lower() in _NO_WORD):
      continue
    out.append((script, word))
  return out


def _weight(words: list[tuple[str, str]]) -> float:
  """Number of words; of characters over characters a word where no spaces are written."""
  return sum(len(word) / _CHARS_A_WORD[script] if script in _CHARS_A_WORD else 1.0 for script, word in words)


def _chunks(text: str, scripts: tuple[str, ...]):
  """Sentences, short ones joined until they have enough words in the scripts; the last may have fewer."""
  chunk, weight = [], 0.0
  enough = max(ENOUGH_WORDS, len(text) / 6 / _MOST_CHUNKS)  # six characters a word, as in English
  for sentence in _SENTENCE_END.split(text):
    words = _words(sentence)
    chunk += words
    weight += _weight([word for word in words if word[0] in scripts])
    if weight >= enough:
      yield chunk
      chunk, weight = [], 0.0
  if chunk:
    yield chunk


def _is_japanese(words: list[tuple[str, str]]) -> bool:
  kana, han = (sum(len(word) for script, word in words if script == name) for name in ('Kana', 'Han'))
  return kana > 0.1 * (kana + han)


def _is_spoken(words: list, own: list, target: str, weight: float) -> bool | None:
  """Whether those words of a chunk that are in the target's scripts are the target's; None if too few to tell."""
  if target in ('zh', 'ja'):
    japanese = _is_japanese(words)
    return None if target == 'ja' and not japanese and weight < ENOUGH_WORDS else japanese == (target == 'ja')
  if not any(script in _SHARED for script, _ in own):
    return True
  if weight < ENOUGH_WORDS:
    return None
  named = _identify(' '.join(word for _, word in own))
  return named == target or named in _SAME.get(target, ())


@functools.cache
def load():
  """The identifier of py3langid; a second the first time. Raises ImportError if it is not installed."""
  from py3langid.langid import MODEL_FILE, LanguageIdentifier
  return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@functools.lru_cache(maxsize=4096)
def _identify(text: str) -> str:
  return load().classify(text)[0]
