"""How often the accuracy reward for mathematics is wrong on the public problem files, and how long it takes.

python benchmarks/verifier_rates.py [--data=../shared/data] [--workers=2] [--timeout_s=5] [--every=1]

Every reference answer is written in the forms in which a model would write it, and must verify against itself; then
each is given as the answer to another problem of its file, and must not, unless the two are the same text or the same
number. Prints one Markdown row a file, then each form that failed and each pair that was taken for equal. Hostile
answers come last: each may cost the limit, and none more.
"""

import argparse
import collections
import json
import pathlib
import random
import time

import tqdm

from moe_rl.data.problem_formats import PARSERS
from moe_rl.rl.rewards import plain_numbers, pool

FILES = {
  'GSM8K test': 'gsm8k/test.jsonl', 'GSM8K train': 'gsm8k/train.jsonl', 'MATH-500': 'math/math500_test.jsonl',
  'MATH train': 'math/math_train_7474.json', 'AIME 2024': 'math_eval/aime24.jsonl', 'AMC 2023': 'math_eval/amc23.jsonl',
  'OlympiadBench': 'math_eval/olympiadbench_oe_to_maths_en.jsonl'}
HOSTILE = {
  'tower of powers': '9^{9^{9^{9}}}', 'factorial of a factorial': '((9!)!)!', 'huge factorial': '10000000!',
  '100,000 characters': 'x+' * 50_000, '100,000 digits': '9' * 100_000, 'unbalanced braces': '}{' * 5_000,
  'nested 1,000 deep': r'\frac{1}{' * 1000 + '1' + '}' * 1000, 'NUL bytes': '1\x00' * 1000, 'parentheses': '(' * 5_000,
  'endless sum': r'\sum_{n=1}^{10^{10}} n^n', 'exponent': '10^{10^{10}}'}


def references(path: pathlib.Path) -> list[str]:
  """Gold answers of a file as text, as training reads them; absent ones left out."""
  text = path.read_text()
  records = json.loads(text) if text.lstrip().startswith('[') else [json.loads(line) for line in text.splitlines()]
  if 'final_answer' in records[0]:
    return [record['final_answer'][0] for record in records]
  if 'gsm8k' in str(path):
    return [PARSERS['gsm8k'](record)[1] for record in records]
  return [f'{record["answer"]:g}' if isinstance(record['answer'], float) else str(record['answer'])
          for record in records if record['answer']]


def forms(reference: str) -> dict[str, str]:
  """Responses that give a reference as the answer, by the name of their form."""
  number = plain_numbers.read(reference, units=False)
  inner = reference.strip()
  inner = inner[1:-1] if inner.count('$') == 2 and inner[0] == inner[-1] == '$' else inner
  formula = inner if '$' in inner else f'${inner}$'
  shown = reference if number else formula
  out = {
    'bare': reference, 'tags': f'<think>7 or 8?</think><answer>{reference}</answer>',
    'boxed': f'<think>7?</think>Adding 3 and 4 we see that the value is \\boxed{{{inner}}}.',
    'boxed in tags': f'<think>7?</think> <answer>$\\boxed{{{inner}}}$</answer>',
    'sentence': f'Since 3+4=7, the answer is {shown}.', 'final answer': f'So 3+4=7.\n\n**Final answer:** {shown}\n',
    'last formula': f'Here $3+4=7$, so that after simplifying the whole expression we get {formula}.'}
  if number is None:
    return out
  out['last number'] = f'First there are 3 and 4 more of these, that makes 7. Then in total we have {reference}.'
  value = number.value
  if number.scale == 1:
    out['fraction'] = f'<answer>{value.numerator}/{value.denominator}</answer>'
    out['LaTeX fraction'] = f'So it is \\boxed{{\\dfrac{{{value.numerator}}}{{{value.denominator}}}}}'
    if 10**12 % value.denominator == 0 and abs(value) < 10**15:
      out['decimal'] = f'<answer>{float(value):.12f}</answer>'.replace('000000000<', '<')
  return out


def tied(a: str, b: str) -> bool:
  """Whether two references are the same text or the same number."""
  x, y = (plain_numbers.read(text, units=False) for text in (a, b))
  same_text = plain_numbers.tidy(a).replace(' ', '') == plain_numbers.tidy(b).replace(' ', '')
  return same_text or bool(x and y and x.value == y.value)


def grade(graders, name: str, items: list[pool.Item]) -> tuple[list[pool.Grade], float]:
  started = time.monotonic()
  with tqdm.tqdm(total=len(items), desc=name, unit='answer', leave=False) as bar:
    return graders.grade(items, tick=bar.update), time.monotonic() - started


def measure(graders, name: str, refs: list[str]) -> tuple[str, list[str]]:
  """One row of the table, and what is wrong."""
  written = [(form, ref, text) for ref in refs for form, text in forms(ref).items()]
  grades, seconds = grade(graders, name, [pool.Item('math', text, ref) for _, ref, text in written])
  right = sum(g.verdict == 'correct' for g in grades)
  wrong = collections.defaultdict(list)
  for (form, ref, _), g in zip(written, grades, strict=True):
    if g.verdict != 'correct':
      wrong[ref, g.verdict].append(form)
  worst = collections.Counter(form for forms_of in wrong.values() for form in forms_of).most_common(1)
  by_form = collections.Counter(form for form, *_ in written)
  least = min([1.0, *(1 - n / by_form[form] for form, n in worst)])
  shuffled = random.Random(0).sample(refs, len(refs))
  pairs = [(a, b) for a, b in zip(shuffled, refs, strict=True) if not tied(a, b)]
  others, more = grade(graders, name, [pool.Item('math', f'<answer>{a}</answer>', b) for a, b in pairs])
  equal = [pair for pair, g in zip(pairs, others, strict=True) if g.verdict == 'correct']
  row = (f'| {name} | {len(refs)} | {len(written)} | {right / len(written):.3%} | {least:.3%} | {len(pairs)} | '
         f'{len(equal) / len(pairs):.3%} | {1e3 * (seconds + more) / (len(written) + len(pairs)):.1f} |')
  notes = [f'{name}: {ref!r} is {verdict} as {", ".join(forms_of)}' for (ref, verdict), forms_of in wrong.items()]
  return row, notes + [f'{name}: {a!r} was taken for {b!r}' for a, b in equal]


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', default='../shared/data', type=pathlib.Path)
  parser.add_argument('--workers', type=int, default=pool.WORKERS)
  parser.add_argument('--timeout_s', type=float, default=pool.TIMEOUT_S)
  parser.add_argument('--every', type=int, default=1, help='take one problem in so many')
  arguments = parser.parse_args()
  notes = []
  with pool.RewardPool(arguments.workers, arguments.timeout_s) as graders:
    graders.grade([pool.Item('math', 'x', 'y')] * 8)  # imports are not what is timed
    print('| file | answers | written in forms | verify | least of any form | shuffled pairs | taken for equal | '
          'ms each |\n| --- | --- | --- | --- | --- | --- | --- | --- |')
    for name, file in FILES.items():
      row, more = measure(graders, name, references(arguments.data / file)[::arguments.every])
      print(row, flush=True)
      notes += more
    print('\n' + '\n'.join(notes))
    items = [pool.Item('math', f'<answer>{text}</answer>', 'x^2+1') for text in HOSTILE.values()]
    grades, _ = grade(graders, 'hostile', items)
    print('\nhostile: ' + ', '.join(f'{name} {g.verdict} {g.seconds:.2f} s'
                                    for name, g in zip(HOSTILE, grades, strict=True)))


if __name__ == '__main__':
  main()
