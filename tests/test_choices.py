"""Multiple choice and exact match."""

import json

import pytest

from moe_rl.data.problems import load_problems
from moe_rl.rl.rewards import functions
from moe_rl.rl.rewards.verdicts import CORRECT, UNPARSABLE_ANSWER, UNPARSABLE_REFERENCE, WRONG

COLOURS = json.dumps({'answer': 'C', 'choices': ['red', 'green', 'blue', '18', 'red']})
CASES = [
    ('C', 'C', CORRECT), ('(C)', 'C', CORRECT), ('C)', '(C)', CORRECT), ('C.', 'C', CORRECT), ('**C**', 'C', CORRECT),
    (r'\boxed{C}', 'C', CORRECT), (r'$\boxed{\text{(C)}}$', 'C', CORRECT), ('C) blue', 'C', CORRECT),
    ('C: blue', 'C', CORRECT),
    ('option c', 'C', CORRECT), ('The answer is (C).', 'C', CORRECT), ('<answer>C</answer>', 'C', CORRECT),
    ('<think>A or B?</think>\nSo the correct answer is: **C**', 'C', CORRECT),
    ('Answer: C - since A is wrong', 'C', CORRECT),
    ('Of all these, only one can be right, which must therefore be (C)', 'C', CORRECT), ('blue', COLOURS, CORRECT),
    ('Blue.', COLOURS, CORRECT), ('C', COLOURS, CORRECT), ('<answer>$18$</answer>', COLOURS, WRONG),
    ('B', COLOURS, WRONG),
    ('red', COLOURS, UNPARSABLE_ANSWER), ('D', 'C', WRONG), ('(B) or (C)', 'C', UNPARSABLE_ANSWER),
    ('B or C', 'C', UNPARSABLE_ANSWER), ('A, C', 'C', UNPARSABLE_ANSWER),
    ('<think>C', 'C', UNPARSABLE_ANSWER), ('', 'C', UNPARSABLE_ANSWER), ('none', 'C', UNPARSABLE_ANSWER),
    ('c', 'C', CORRECT), ('(c)', 'c', CORRECT), ('选C', 'C', CORRECT), ('The correct option is C.', 'C', CORRECT),
    ('The answer is C because A is wrong', 'C', CORRECT),
    ('A' * 20_000, 'A', UNPARSABLE_ANSWER), ('C', 'CD', UNPARSABLE_REFERENCE), ('C', '', UNPARSABLE_REFERENCE),
    ('C', '{"answer": "C", "choices": ["a", "b"]}', UNPARSABLE_REFERENCE), ('C', '{"answer": 2}', UNPARSABLE_REFERENCE),
]  # fmt: skip


@pytest.mark.parametrize('response, reference, verdict', CASES)
def test_a_choice_is_its_letter_or_its_text(response, reference, verdict):
  assert functions.grade('choice', response, reference)[0] == verdict


@pytest.mark.parametrize('answer, reference, verdict', [
    ('two words', 'two  words\n', CORRECT), ('Two words', 'two words', WRONG), ('', 'x', UNPARSABLE_ANSWER),
    ('x', ' ', UNPARSABLE_REFERENCE),
])  # fmt: skip
def test_exact_match_is_exact_but_for_white_space(answer, reference, verdict):
  assert functions.grade('exact', f'<answer>{answer}</answer>', reference)[0] == verdict


@pytest.mark.data
@pytest.mark.parametrize('name, count', [('mmlu_stem_test.jsonl', 3018), ('aqua_test.jsonl', 254)])
def test_public_questions_load_and_their_answers_are_right_in_each_form_and_the_others_wrong(shared_data, name, count):
  problems = load_problems(shared_data / 'multiple_choice' / name)
  assert len(problems) == count and {p.kind for p in problems} == {'choice'}
  lost = []
  for problem in problems:
    fields = json.loads(problem.reference)
    letter, choices = fields['answer'], fields['choices']
    text = choices[ord(letter) - 65]
    assert f'\n{letter}) {text}' in problem.question
    other = 'ABCDE'[('ABCDE'.index(letter) + 1) % len(choices)]
    for form in ('{}', '<answer>{}</answer>', 'So the answer is ({}).', r'\boxed{{{}}}'):
      assert functions.grade('choice', form.format(letter), problem.reference)[0] == CORRECT
      assert functions.grade('choice', form.format(other), problem.reference)[0] == WRONG
    forms = ['<answer>{0}) {1}</answer>', 'The answer is ({0}) {1}.', '<answer>{1}</answer>']
    for form in forms[:2 + (choices.count(text) == 1 and len(text) > 1)]:
      if functions.grade('choice', form.format(letter, text), problem.reference)[0] != CORRECT:
        lost.append(form.format(letter, text))
  # Texts that differ in capitals alone (Bb Bb), or speak of answers themselves: 4 of 9,054 ways of MMLU, none of AQuA.
  assert len(lost) <= 4, lost
