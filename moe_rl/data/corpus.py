"""The text that the embedded base is pre-trained on: the same problems, written by people of mixed care.

Most documents answer at once, some work step by step, some of those slip and of these some notice ("wait"), some go
over the work twice ("check"), some are malformed. They think in English, in Chinese or in both at once, whatever the
language of the question. Nothing here says that working pays, or what to think in; that is for RL to find.
"""

import dataclasses
import random

from moe_rl.data.tasks import Chain, held_out
from moe_rl.data.templates import render


@dataclasses.dataclass(frozen=True)
class Mix:
  """Shares of the documents, the rest being sheets of single sums, and rates of what befalls them."""

  direct: float = 0.66
  steps: float = 0.22
  malformed: float = 0.09
  slip: float = 0.03  # a step of a worked document
  wait: float = 0.5  # of the slips are noticed
  check: float = 0.10  # of the worked documents go over it again
  guess: float = 0.6  # of the direct documents give a near miss
  mixed: float = 0.4  # of the worked documents change their language as they go; the others are half English

  def __post_init__(self):
    total = self.direct + self.steps + self.malformed
    if total > 1 + 1e-6:
      raise ValueError(f'config.corpus: direct + steps + malformed is {total:g}, must not exceed 1')


LANGUAGES = ('en', 'zh')
THEN, WAIT, CHECK = (dict(zip(LANGUAGES, words, strict=True)) for words in (
  (' then ', '然后'), (' wait ', '等等'), (' check ', '检查')))  # a token each
SHRUGS = ('', '', '', '', 'easy', 'sure', 'hm', '简单')  # all the thinking of a direct answer


def document(chain: Chain, mix: Mix, rng: random.Random) -> str:
  """One document, prompt and response, never on a held-out question."""
  while True:
    question, totals = chain.draw(rng)
    if not held_out(question):
      break
  facts_share = max(0.0, 1 - mix.direct - mix.steps - mix.malformed)
  style = rng.choices(('direct', 'steps', 'malformed', 'facts'),
                      (mix.direct, mix.steps, mix.malformed, facts_share))[0]
  if style == 'facts':
    return facts(chain, rng)
  prompt = render('short', question)
  if style == 'direct' or (style == 'malformed' and rng.random() < 0.7):
    thinking, answer = rng.choice(SHRUGS), totals[-1]
    if rng.random() < mix.guess:
      answer = max(0, answer + rng.choice((-3, -2, -1, 1, 2, 3)))
  else:
    thinking, answer = work(question, totals, mix, rng)
  response = f'<think>{thinking}</think><answer>{answer}</answer>'
  return prompt + (spoil(response, thinking, answer, rng) if style == 'malformed' else response)


def work(question: str, totals: list[int], mix: Mix, rng: random.Random) -> tuple[str, int]:
  """Running sums such as `8+1=9 then 9-8=1`, with slips, some noticed; maybe a second pass. Returns text and answer."""
  spoken = LANGUAGES if rng.random() < mix.mixed else (rng.choice(LANGUAGES),)

  def one_pass() -> tuple[str, int]:
    total, text = totals[0], ''
    for sign, term in zip(question[1:-2:2], question[2:-2:2], strict=True):
      link = THEN[rng.choice(spoken)] if text else ''
      sum_, right = f'{total}{sign}{term}', total + int(sign + term)
      total = right
      text += f'{link}{sum_}='
      if rng.random() >= mix.slip:
        text += f'{right}'
        continue
      wrong = max(0, right + rng.choice((-10, -2, -1, 1, 2, 10)))
      if rng.random() < mix.wait:
        text += f'{wrong}{WAIT[rng.choice(spoken)]}{sum_}={right}'
      else:
        text, total = f'{text}{wrong}', wrong
    return text, total

  first, result = one_pass()
  if rng.random() >= mix.check:
    return first, result
  second, again = one_pass()
  text = f'{first}{CHECK[rng.choice(spoken)]}{second}'
  if again == result:
    return text, result
  third, last = one_pass()  # they disagree: a third decides
  return f'{text}{CHECK[rng.choice(spoken)]}{third}', last


def facts(chain: Chain, rng: random.Random) -> str:
  """A sheet of single sums, as a school book has them."""
  lines = []
  for _ in range(8):
    term = rng.randint(1, 9)
    if rng.random() < 0.5:
      total = rng.randint(0, chain.max_total - term)
      lines.append(f'{total}+{term}={total + term}')
    else:
      total = rng.randint(term, chain.max_total)
      lines.append(f'{total}-{term}={total - term}')
  return ','.join(lines)


def spoil(response: str, thinking: str, answer: int, rng: random.Random) -> str:
  """The response without its proper form: tags missing, doubled or out of order, or no tags at all."""
  return rng.choice((
    f'{answer}',
    f'<answer>{answer}</answer>',
    f'<think>{thinking}</think>{answer}',
    f'<think>{thinking}<answer>{answer}</answer>',
    f'{response}<answer>{answer}</answer>',
    f'<answer>{answer}</answer><think>{thinking}</think>',
  ))
