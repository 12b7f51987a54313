"""The text that the embedded base is pre-trained on: the same problems, written by people of mixed care.

Most documents answer at once, some work step by step, some of those slip and of these some notice ("wait"), some go
over the work twice ("check"), some are malformed. Nothing here says that working pays; that is for RL to find.
"""

import dataclasses
import random

from moe_rl.data.tasks import Chain, held_out
from moe_rl.data.templates import render


@dataclasses.dataclass(frozen=True)
class Mix:
  """Shares of the documents (they sum to 1) and rates of their faults."""

  direct: float = 0.66
  steps: float = 0.22
  malformed: float = 0.09
  facts: float = 0.03
  slip: float = 0.03  # a step of a worked document
  wait: float = 0.5  # of the slips are noticed
  check: float = 0.10  # of the worked documents go over it again
  guess: float = 0.6  # of the direct documents give a near miss

  def __post_init__(self):
    total = self.direct + self.steps + self.malformed + self.facts
    if abs(total - 1) > 1e-6:
      raise ValueError(f'config.corpus: direct + steps + malformed + facts is {total:g}, must be 1')


def document(chain: Chain, mix: Mix, rng: random.Random) -> str:
  """One document, prompt and response, never on a held-out question."""
  while True:
    question, totals = chain.draw(rng)
    if not held_out(question):
      break
  style = rng.choices(('direct', 'steps', 'malformed', 'facts'),
                      (mix.direct, mix.steps, mix.malformed, mix.facts))[0]
  if style == 'facts':
    return facts(chain, rng)
  prompt = render('short', question)
  if style == 'direct' or (style == 'malformed' and rng.random() < 0.7):
    thinking, answer = rng.choice(('', '', '', 'easy', 'sure', 'hm')), totals[-1]
    if rng.random() < mix.guess:
      answer = max(0, answer + rng.choice((-3, -2, -1, 1, 2, 3)))
  else:
    thinking, answer = work(question, totals, mix, rng)
  response = f'<think>{thinking}</think><answer>{answer}</answer>'
  return prompt + (spoil(response, thinking, answer, rng) if style == 'malformed' else response)


def work(question: str, totals: list[int], mix: Mix, rng: random.Random) -> tuple[str, int]:
  """Running sums such as `8+1=9,9-8=1`, with slips, some noticed; maybe a second pass. Returns text and answer."""
  first, result = one_pass(question, totals, mix, rng)
  if rng.random() >= mix.check:
    return first, result
  second, again = one_pass(question, totals, mix, rng)
  if again == result:
    return f'{first} check {second}', result
  third, last = one_pass(question, totals, mix, rng)  # they disagree: a third decides
  return f'{first} check {second} check {third}', last


def one_pass(question: str, totals: list[int], mix: Mix, rng: random.Random) -> tuple[str, int]:
  total, steps = totals[0], []
  for sign, term in zip(question[1:-2:2], question[2:-2:2], strict=True):
    right = total + int(sign + term)
    if rng.random() < mix.slip:
      wrong = max(0, right + rng.choice((-10, -2, -1, 1, 2, 10)))
      steps.append(f'{total}{sign}{term}={wrong}')
      if rng.random() >= mix.wait:
        total = wrong
        continue
      steps.append(f'wait {total}{sign}{term}={right}')
    else:
      steps.append(f'{total}{sign}{term}={right}')
    total = right
  return ','.join(steps), total


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
