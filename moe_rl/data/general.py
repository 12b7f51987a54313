"""General prompts for the tiny model, in which answers differ by taste and none is checked: counting in two languages.

    python -m moe_rl.data.general --out=DIR --traces=500 --pairs=1000 --prompts=200

`count from 3 to 6` or `从3数到6` asks for the numbers in words of its own language, in order, each once, with spaces:
`three four five six`, `三 四 五 六`. An answer is the better, the more of these four virtues it has (`quality`).
Everything is addressed by (seed, index).
"""

import argparse
import dataclasses
import json
import pathlib
import random
import re
import sys

WORDS = {'en': 'one two three four five six seven eight nine'.split(), 'zh': list('一二三四五六七八九')}
QUESTIONS = {'en': 'count from {} to {}', 'zh': '从{}数到{}'}
THOUGHTS = {'en': ('up from {}', 'down from {}'), 'zh': ('从{}往上', '从{}往下')}
NONE_AT_ALL = 0.05  # of the worse answers are empty, as is what a thought that never ends leaves
MOST = 5  # numbers in an answer: in English 29 characters, which are 29 tokens of the tiny model
_WORD = re.compile('|'.join(word for words in WORDS.values() for word in words))


@dataclasses.dataclass(frozen=True)
class Counting:
  """language: 'en' or 'zh'; first, last: 1 to 9, of which the second may be the smaller."""

  language: str
  first: int
  last: int

  @property
  def question(self) -> str:
    return QUESTIONS[self.language].format(self.first, self.last)

  @property
  def numbers(self) -> list[int]:
    step = 1 if self.last > self.first else -1
    return list(range(self.first, self.last + step, step))

  @property
  def answer(self) -> str:
    return written(self.numbers, self.language)

  @property
  def thought(self) -> str:
    return THOUGHTS[self.language][self.last < self.first].format(WORDS[self.language][self.first - 1])

  def response(self, answer: str) -> str:
    return f'<think>{self.thought}</think><answer>{answer}</answer>'


ALL = [Counting(language, first, last) for language in WORDS for first in range(1, 10) for last in range(1, 10)
       if 0 < abs(last - first) < MOST]


def written(numbers: list[int], language: str, space: str = ' ') -> str:
  return space.join(WORDS[language][n - 1] for n in numbers)


def asked(question: str) -> Counting:
  """The counting that a question asks for. Raises ValueError if it asks for something else."""
  found = next((c for c in ALL if c.question == question), None)
  if found is None:
    raise ValueError(f'{question!r} asks for no counting: write such as {ALL[0].question!r}')
  return found


def quality(question: str, answer: str) -> float:
  """0 to 1: a quarter for each virtue: complete (every number, none twice, none other), in order, spaced, and in the
  language of the question; 0 for an answer without a number."""
  wanted, found = asked(question), _WORD.findall(answer)
  if not found:
    return 0.0
  numbers = [next(words.index(word) + 1 for words in WORDS.values() if word in words) for word in found]
  sign = 1 if wanted.last > wanted.first else -1
  return sum((sorted(numbers) == sorted(wanted.numbers),
              all(sign * (b - a) > 0 for a, b in zip(numbers, numbers[1:], strict=False)),
              answer.split() == found,
              all(word in WORDS[wanted.language] for word in found))) / 4


def spoilt(counting: Counting, rng: random.Random, faults: int) -> str:
  """The answer without `faults` of the virtues."""
  numbers, language, space = counting.numbers, counting.language, ' '
  chosen = rng.sample(('complete', 'order', 'space', 'language'), faults)
  if 'complete' in chosen:  # one is lacking, or one more is there
    at = rng.randrange(len(numbers))
    if len(numbers) > 2 and rng.random() < 0.5:
      del numbers[at]
    else:
      lacking = [n for n in range(1, 10) if n not in numbers]
      numbers = sorted([*numbers, rng.choice(lacking)], reverse=counting.last < counting.first)
  if 'order' in chosen:
    right = list(numbers)
    while numbers == right:
      rng.shuffle(numbers)
  if 'space' in chosen:
    space = rng.choice(('', ',', '-'))
  if 'language' in chosen:
    language = next(other for other in WORDS if other != language)
  return written(numbers, language, space)


def _draw(purpose: str, seed: int, index: int) -> tuple[random.Random, Counting]:
  rng = random.Random(f'general/{purpose}/{seed}/{index}')
  return rng, rng.choice(ALL)


def general_traces(seed: int, n: int) -> list[dict]:
  """Good answers with their thoughts, to be learnt from: question and response, and where they come from."""
  drawn = [_draw('trace', seed, i)[1] for i in range(n)]
  return [{'question': c.question, 'response': c.response(c.answer), 'kind': 'open', 'task': 'general', 'id': i,
           'source': {'program': 'moe_rl.data.general', 'seed': seed}} for i, c in enumerate(drawn)]


def preference_pairs(seed: int, n: int) -> list[dict]:
  """question, chosen, rejected, each a whole response: the chosen answer has more of the four virtues."""
  out = []
  for i in range(n):
    rng, counting = _draw('pair', seed, i)
    better = rng.choice((0, 0, 0, 1, 2))
    worse = spoilt(counting, rng, rng.randint(better + 1, 4))
    answers = spoilt(counting, rng, better), '' if rng.random() < NONE_AT_ALL else worse
    chosen, rejected = map(counting.response, answers)
    out.append({'question': counting.question, 'chosen': chosen, 'rejected': rejected})
  return out


def general_prompts(seed: int, n: int) -> list[dict]:
  """Questions alone, none twice before all were there."""
  order = []
  for cycle in range(-(-n // len(ALL))):
    order += random.Random(f'general/prompts/{seed}/{cycle}').sample(ALL, len(ALL))
  return [{'question': counting.question} for counting in order[:n]]


def write(folder: pathlib.Path, seed: int, traces: int, pairs: int, prompts: int) -> dict[str, int]:
  """general.jsonl, pairs.jsonl and prompts.jsonl in a folder: their lines by path. Raises OSError."""
  folder.mkdir(parents=True, exist_ok=True)
  out = {}
  for name, lines in (('general', general_traces(seed, traces)), ('pairs', preference_pairs(seed, pairs)),
                      ('prompts', general_prompts(seed, prompts))):
    path = folder / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines))
    out[str(path)] = len(lines)
  return out


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog='python -m moe_rl.data.general', description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, required=True, help='a folder')
  parser.add_argument('--traces', type=int, default=500, help='lines of general.jsonl: question, response')
  parser.add_argument('--pairs', type=int, default=1000, help='lines of pairs.jsonl: question, chosen, rejected')
  parser.add_argument('--prompts', type=int, default=200, help='lines of prompts.jsonl: question')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  if min(args.traces, args.pairs, args.prompts) < 0:
    print('error: --traces, --pairs and --prompts are numbers of lines, 0 or more', file=sys.stderr)
    return 2
  try:
    for path, lines in write(args.out, args.seed, args.traces, args.pairs, args.prompts).items():
      print(f'{path}: {lines} lines')
  except OSError as e:
    print(f"error: --out '{args.out}': cannot be written ({e.strerror}): choose another folder", file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
