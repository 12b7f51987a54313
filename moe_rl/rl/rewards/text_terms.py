"""Terms of the reward that read text. They run in the reward workers, so nothing here loads numpy at import."""

import re
from collections.abc import Callable

from moe_rl.rl.rewards import extract, language

_NGRAM = 8
_WORD = re.compile(r'[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+|[^\w\s]')


def language_consistency(response: str, target: str) -> float:
  """Share of the thinking's words in the target language, 0 to 1; 0 without thinking."""
  thought = extract.thinking(response)
  return language.share(thought, target) if thought else 0.0


def repetition(response: str, argument: str = '') -> float:
  """Minus the share of the n-grams that have been there before, -1 to 0; 0 with less than n words. Linear time.

  Words are runs of letters and digits, single Chinese or Japanese characters, and single marks.
  """
  size, words = int(argument or _NGRAM), _WORD.findall(response)
  count = len(words) - size + 1
  if count < 1:
    return 0.0
  return len({tuple(words[i:i + size]) for i in range(count)}) / count - 1.0


def _check_size(argument: str) -> None:
  if not re.fullmatch('[1-9][0-9]?', argument):
    raise ValueError(f'{argument!r} is no number of words from 1 to 99')


# Name -> (response, argument) -> score, and the check of an argument.
TERMS: dict[str, tuple[Callable[[str, str], float], Callable[[str], None]]] = {
    'language': (language_consistency, language.check_target), 'repetition': (repetition, _check_size)}


def resolve(key: str, question: str) -> str:
  """The key with all that depends on the question: `language` becomes `language:zh` for a Chinese one."""
  return f'language:{language.of_question(question)}' if key == 'language' else key


def score(key: str, response: str) -> float:
  """A term's score of one response, by its key such as `language:en`."""
  name, _, argument = key.partition(':')
  return TERMS[name][0](response, argument)


def needs_model(keys: tuple[str, ...]) -> bool:
  """Whether some term needs the model of py3langid."""
  return any(language.needs_model(key.partition(':')[2]) for key in keys if key.startswith('language'))
