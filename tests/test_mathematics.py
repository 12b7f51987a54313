"""Mathematical answers: where they stand in a response, how they may be spelled, and what they must not equal."""

import random
import time

import pytest

from moe_rl.rl.rewards import extract, plain_numbers, pool, spellings
from moe_rl.rl.rewards.verdicts import CORRECT, TIMEOUT, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, WRONG


@pytest.fixture(scope='module')
def graders():
  """30 s: here a loaded machine must not turn a verdict to timeout."""
  with pool.RewardPool(workers=2, timeout_s=30.0) as shared_pool:
    yield shared_pool


ANSWERS = [
    # The tags come first, the last complete ones; then nothing, if thinking never ended.
    (r'\boxed{1} <answer> 2 </answer> 3', '2'), ('<answer>1</answer><answer>2', '1'), ('<think>so it is 18', None),
    (r'<think>\boxed{18}', None), ('<think>a</think><answer>The answer is 18, since 9*2=18.</answer>', '18'),
    ('<answer>17 or 18</answer>', '17 or 18'), ('<answer>The answer is 17. The answer is 18.</answer>',
                                                'The answer is 17. The answer is 18.'),
    # After the thinking, the last box; a box without an end is no answer.
    (r'<think>\boxed{7}</think> So \boxed{8} or rather $\boxed{\frac{1}{2}}$.', r'\frac{1}{2}'),
    (r'opened by the template</think>so \boxed{18}', '18'), (r'\boxed{1} and then \boxed{2', None),
    (r'The answer is 7, so \boxed{8}', '8'), (r'\fbox{3}', '3'),
    # What is said to be the answer.
    ('3+4=7. The answer is 18.', '18'), ('**Final answer:** 18 eggs\n\nI used 3 numbers.', '18 eggs'),
    ('The answer is $x = 5$ since $y = 3$.', 'x = 5'), ('### Answer\n18', '18'), ('so 4.\n#### 1,200', '1,200'),
    ('The answers are $1$, $2$ and $3$.', '1, 2, 3'),
    ('The final answer is: $(3, \\frac{\\pi}{2})$', '(3, \\frac{\\pi}{2})'),
    ('First 1. The answer is 3.5 metres because 7/2 = 3.5', '3.5 metres'), ('答案是18。', '18'), ('Answer: C', 'C'),
    ('The answer is, as anybody can see from all of the above, 18 of them.', '18'),
    ('The result is 18. Then she gives away 10, which leaves 8', '8'), ('After all, the solution is (1, 2).', '(1, 2)'),
    # A bare answer.
    ('总共有 42 元', '42'),
    ('18', '18'), (r'\frac{1}{2}', r'\frac{1}{2}'), ('x^2 + 2x + 1', 'x^2 + 2x + 1'), ('18 dollars', '18 dollars'),
    (r'\text{two parallel lines}', r'\text{two parallel lines}'),
    # The last formula or number.
    ('We have 3 apples and 4 pears, and all in all that makes 7 fruits', '7'),
    ('Adding these we get, after much work with fractions, $\\frac{1}{2}$.', r'\frac{1}{2}'),
    ('Working from $3+4$ it follows step by step that $a=1$, $b=2$.', 'a=1, b=2'),
    ('She pays $18 and he pays $20, so that all together they have paid $38.', '$38'),
    ('There are many numbers that could be asked for: 3,000 of them, or rather .5', '.5'),
    ('nothing of the kind could ever be found in here', None), ('', None),
]  # fmt: skip


@pytest.mark.parametrize('response, answer', ANSWERS)
def test_the_answer_is_found_by_the_documented_order(response, answer):
  assert extract.final_answer(response) == answer


@pytest.mark.parametrize('text', [
    '$', '$$', '$a', r'\(', r'\boxed{', 'answer is ', '1,', 'a ', '{', '\\', 'x', '. ', '1 '])  # fmt: skip
def test_finding_an_answer_takes_bounded_time(text):
  start = time.perf_counter()
  extract.final_answer(text * (10**6 // len(text)))
  assert time.perf_counter() - start < 2.0  # 0.3 s the slowest measured


EQUAL = [
    ('sqrt(2)/2', r'\frac{\sqrt{2}}{2}'), ('3*sqrt(5)', r'3\sqrt{5}'), ('2*pi', r'2\pi'), ('pi/4', r'\frac{\pi}{4}'),
    ('2√3', r'2\sqrt{3}'), ('x²+1', 'x^2+1'), ('½', r'\frac12'), ('1.5e3', '1500'), ('(x+1)**2', 'x^2+2x+1'),
    ('1 1/2', '1.5'), (r'1\frac{1}{2}', r'\frac32'), ('[2, ∞)', r'[2,\infty)'), ('18°', r'18^\circ'),
    ('2^{10}', '1024'),
    ('{1,2}', r'\{2,1\}'), ('x=1 or x=2', '1,2'), ('y = 2x+1', '2x+1'), ('2x+1', 'y=2x+1'),
    (r'\frac{-3}{4}', r'-\frac34'),
    ('sin(x)', r'\sin x'), ('ln(2)', r'\ln 2'), ('5!', '120'), ('4i+3', '3+4i'), (r'0.1\overline{6}', r'\frac16'),
    ('friday', r'\text{Friday}'), ('B', r'\text{(B)}'), ('110 base 2', '110_2'), (r'110_{\text{two}}', '110_2'),
    ('[-2,7]', r'x \in [-2,7]'), ('(3, π/2)', r'\left( 3, \frac{\pi}{2} \right)'),
    (r'2007 + pi/2', r'2007 + \frac\pi 2'),
    ('8.24 mph', r'\approx 8.24 \text{ mph}'), ('20', r'20\text{ miles}'), ('$5.00', '5'), ('`18`', '18'),
    ('18个', '18'),
    ('€18', '18'), (r'18\,\text{cm}', '18'), ('a total of 18 apples', '18'), ('$18 per day', '18'),
    ('x=18 apples', '18'),
    (r'\begin{bmatrix}1&2\\3&4\end{bmatrix}', r'\begin{pmatrix}1&2\\3&4\end{pmatrix}'), ('34%', '0.34'),
    ('17/50', '0.34'),
    (r'33.\overline{3}\%', r'33\frac13\%'), (r'0.\dot{3}', '1/3'), (r'1\,000', '1000'), (r'\bf 18', '18'),
    (r'3^\circ C', '3'),
    (r'\textbf{(B) } 12', '12'), (r'\textbf{(B) } 12', r'\text{(B)}'), ('42 clips (6 * 7 = 42)', '42'), ('3。', '3'),
    ('x > 0', r'(0,\infty)'), ('2 < k \\le 5', '(2,5]'), (r'x<1 \text{ or } x>3', r'(-\infty,1)\cup(3,\infty)'),
    (r'\frac{1\pm\sqrt5}{2}', r'\frac{1+\sqrt{5}}{2},\frac{1-\sqrt5}{2}'), (r'e^{i\pi/2}', 'i'),
    ('(1,2,3)', r'\begin{pmatrix}1\\2\\3\end{pmatrix}'), (r'\langle 1,2,3\rangle', '(1,2,3)'),
    (r'1 : 2 : 3', '1:2:3'),
    ('1.6e-19', r'1.6 \times 10^{-19}'), ('2.8284271247461903', r'2\sqrt2'), ('(0.5, 2)', r'(\frac12, 2)'),
    ('3 hours 20 minutes', r'3\text{ hours } 20 \text{ minutes}'),
    ('Thus x = 5', '5'), ('so we get (1, 2)', '(1,2)'), (r'$1,2$', '2,1'), ('n^2-n-1', r'm_{\max }=n^{2}-n-1'),
]  # fmt: skip
DIFFERENT = [
    ('0.33', '1/3'), ('1,2', '(2,1)'), ('(2,1)', '(1,2)'), ('12', '1,2'), ('2', '1,2'), ('1,2,3', '1,2'),
    ('1', '(1,2)'),
    ('2', r'2\pi'), ('x=3', 'y=3'), ('18 apples and 3 pears', '18'), ('-18', '18'), ('18%', '1800'), ('5x', '5'),
    # To math-verify these are equal: it rounds.
    ('1.7e-19', r'1.6 \times 10^{-19}'), ('0.0', '10^{-7}'), ('(0.333333, 2)', r'(\frac13, 2)'),
    ('1.414214', r'\sqrt2'),
    ('0.333333, 2', r'\frac13, 2'), ('e^{-50}', 'e^{-60}'), (r'\sqrt{2}+10^{-20}', r'\sqrt2'), ('2^{64}+1', '2^{64}'),
    ('1:3:2', '1:2:3'),
    ('3 ft 4 in', '3'), ('3 apples, 4 pears', '4'), ('x=3\ny=4', '4'), ('3, 4', '3 < x < 4'), ('$3$, $4$ or $5$', '5'),
    ('x^2', 'x^3'), (r'\frac{1}{2}', r'\frac{2}{1}'), ('110_3', '110_2'), ('[1,2)', '[1,2]'), (r'\sin x', r'\cos x'),
]  # fmt: skip


def test_what_is_equal_is_equal_however_it_is_written_and_nothing_else(graders):
  cases = [(a, b, CORRECT) for a, b in EQUAL] + [(a, b, WRONG) for a, b in DIFFERENT]
  grades = graders.grade([pool.Item('math', f'<answer>{a}</answer>', b) for a, b, _ in cases])
  assert [(*case, grade.verdict) for case, grade in zip(cases, grades, strict=True) if grade.verdict != case[2]] == []


def test_a_reference_that_cannot_be_read_is_told_from_an_answer_that_cannot(graders):
  responses = ['<answer>18</answer>', '<think>18', '', '18']
  grades = graders.grade([pool.Item('math', response, reference) for reference in ('...', r'\frac{1}{2}x')
                          for response in responses])
  assert [g.verdict for g in grades] == [UNPARSABLE_REFERENCE] * 4 + [WRONG, *[UNPARSABLE_ANSWER] * 2, WRONG]


def test_spelling_leaves_latex_as_it_is():
  for text in (r'\frac{\sqrt{2}}{2}', r'\left(3, \frac{\pi}{2}\right)', r'x^{2}+\sin x',
               r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}', r'\text{Evelyn}',
               '12,345', r'\{1\pm\sqrt{5},-2\}'):  # fmt: skip
    assert spellings.to_latex(text) == text


def test_plain_numbers_are_exact():
  rng = random.Random(0)
  for _ in range(200):
    top, bottom = rng.randint(-999, 999), rng.randint(1, 999)
    number = plain_numbers.read(rf'\frac{{{abs(top)}}}{{{bottom}}}', units=False)
    assert number.same(plain_numbers.read(f'{abs(top)}/{bottom}', units=False))
    assert not number.same(plain_numbers.read(f'{abs(top) + 1}/{bottom}', units=False))


HOSTILE = {
    'tower of powers': '9^{9^{9^{9}}}', 'factorial of factorials': '((9!)!)!', 'huge factorial': '10000000!',
    '100k characters': 'x+' * 50_000, '100k digits': '9' * 100_000, 'unbalanced': r'\boxed{\frac{1}{2',
    'braces': '}{' * 1000,
    'nested 1,000 deep': r'\frac{1}{' * 1000 + '1' + '}' * 1000,
    'roots 1,000 deep': r'\sqrt{' * 1000 + '2' + '}' * 1000,
    'NUL': '1\x008\x00', 'half a character': '\ud800',
    'dollars': '$' * 100_000, 'parentheses': '(' * 2000 + '1' + ')' * 2000,
    'big sum': r'\sum_{n=1}^{10^{10}} n^n', 'integral': r'\int_0^\infty e^{-x^x} dx', 'exponent': '10^{10^{10}}',
    'primes': '2' * 4000,
}  # fmt: skip


def test_hostile_answers_cost_at_most_the_limit_each_and_are_never_right():
  limit = 1.0
  items = [pool.Item('math', (f'<answer>{text}</answer>', f'After all, the final answer is {text}')[i % 2], 'x^2+1')
           for i, text in enumerate(HOSTILE.values())]
  with pool.RewardPool(workers=2, timeout_s=limit) as graders:
    graders.grade([pool.Item('math', 'x', 'y')] * 4)
    grades = graders.grade(items)
  assert CORRECT not in {grade.verdict for grade in grades}
  assert TIMEOUT in {grade.verdict for grade in grades}  # the limit was put to the test
  assert max(grade.seconds for grade in grades) < limit + 1.0  # a kill comes late on a loaded machine
