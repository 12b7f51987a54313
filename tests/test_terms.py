"""The terms of the reward beside accuracy: language, repetition, length; and their weights."""

import json
import pathlib
import random
import time

import numpy as np
import pytest

from moe_rl.rl.rewards import language, pool, terms, text_terms
from moe_rl.rl.rewards.verdicts import CORRECT, TIMEOUT, UNPARSABLE_REFERENCE, WRONG

EN = 'So we first add the two numbers together and then we look at what is left over'
ZH = '所以我们先把两个数加在一起，然后再看看剩下多少。'
ES = 'Entonces sumamos primero los dos números y después miramos lo que nos queda por hacer'


def near(value: float) -> object:
  return pytest.approx(value, abs=1e-6)


# Language.


@pytest.mark.parametrize('text, target, low, high', [
    (EN, 'en', 1, 1), (ZH, 'zh', 1, 1), (ES, 'es', 1, 1), (EN, 'zh', 0, 0), (ZH, 'en', 0, 0), (ES, 'en', 0, 0),
    (EN, 'es', 0, 0),
    (EN + '. ' + ZH, 'en', 0.45, 0.6), (EN + '. ' + ZH, 'zh', 0.4, 0.55), (f'{EN}. {ES}.', 'en', 0.4, 0.6),
    ('我们 need to 计算 the sum of 两个 numbers', 'en', 0.45, 0.75), ('我们需要 compute 这两个数的和', 'zh', 0.8, 0.9),
    ('では、二つの数を足してから残りを見ましょう。', 'ja', 1, 1),
    ('では、二つの数を足してから残りを見ましょう。', 'zh', 0, 0),
    ('먼저 두 수를 더한 다음 남은 것을 봅시다', 'ko', 1, 1),
    ('Сначала сложим оба числа, а потом посмотрим, что осталось у нас', 'ru', 1, 1),
    # Nobody's language: formulas, code, numbers, names of variables and functions.
    ('8+1=9, 9-8=1, 1+9=10', 'en', 1, 1), ('8+1=9, 9-8=1, 1+9=10', 'zh', 1, 1), ('', 'en', 1, 1),
    (ZH + r'$\frac{x}{y}$ 等于 \boxed{\text{the answer}} 以及 x_1 + y_2，所以 f(x) = sin x，面积是 ABC。', 'zh', 1, 1),
    (ZH + '\n```python\nfor number in range(10):\n  print(number)\n```\n见 https://example.com/some/page', 'zh', 1, 1),
    (ZH + r'\[ \int_a^b \sin(x) dx \]', 'zh', 1, 1), (EN + ' \\( 数 = 5 \\) and so on', 'en', 1, 1),
    # Few words go with the rest, and are believed if nothing else is there.
    ('wait, that is wrong', 'en', 1, 1), ('ja', 'en', 1, 1), (ES + '. ' + 'wait, no', 'es', 1, 1),
    ('等等 wait', 'zh', 0.5, 0.6),
])  # fmt: skip
def test_the_share_of_words_in_a_language(text, target, low, high):
  assert low <= language.share(text, target) <= high


def test_the_language_of_a_question():
  assert [language.of_question(q) for q in (EN, ZH, ES, '8+1=?', '求 8+1 的值', 'How many?', '二つの数の和は')] == [
      'en', 'zh', 'es', 'en', 'zh', 'en', 'ja']  # fmt: skip


def test_an_unknown_language_is_refused_with_what_there_is():
  with pytest.raises(ValueError, match="'english' is not known: use an ISO 639-1 code such as en, zh"):
    language.share(EN, 'english')


def test_language_is_told_in_linear_time():
  for text in ('a', 'word ', '$', '`', '\\(', '\\begin{', '<', '字', '.', 'a(', '\\[x', '‘'):
    start = time.perf_counter()
    language.share(text * (100_000 // len(text)), 'en')
    assert time.perf_counter() - start < 3.0, text


TARGETS = 'en zh ja de fr es ru ko ar pt it vi th hi'.split()


@pytest.mark.data
@pytest.mark.parametrize('name, least', [('sentences.jsonl', 0.99), ('udhr_paragraphs.jsonl', 0.99)])
def test_labelled_sentences_of_eight_words_are_separated_from_all_other_languages(shared_data, name, least):
  """Wanted are 97%; measured 99.6% and 99.6%. What is lost has letters missing in the file, or is Hindi like Nepali."""
  rows = [json.loads(line) for line in (shared_data / 'langid' / name).read_text().splitlines()]
  right = []
  for row in rows:
    target = row['lang'].split('-')[0]
    chunks = language._chunks(language._clean(row['text']), tuple(language._SCRIPTS))
    if language._weight([word for chunk in chunks for word in chunk]) >= language.ENOUGH_WORDS:
      named = [other for other in TARGETS if language.share(row['text'], other) >= 0.5]
      right.append(named == [target])
  assert len(right) > 700 and np.mean(right) >= least


@pytest.mark.data
def test_mixing_two_languages_lowers_the_share_as_it_was_mixed(shared_data):
  rows = [json.loads(line) for line in (shared_data / 'langid' / 'sentences.jsonl').read_text().splitlines()]
  by = {lang: [row['text'] for row in rows if row['lang'] == lang] for lang in ('en', 'zh', 'de')}
  rng = random.Random(0)
  for other in ('zh', 'de'):
    shares = []
    for part in range(11):
      text = '\n'.join(rng.sample(by['en'], 20 - 2 * part) + rng.sample(by[other], 2 * part))
      shares.append(language.share(text, 'en'))
    assert shares[0] > 0.97 and shares[-1] < 0.05  # German news has English names in it
    np.testing.assert_allclose(shares, np.linspace(1, 0, 11), atol=0.25)  # sentences differ in length
    assert np.corrcoef(shares, np.linspace(1, 0, 11))[0, 1] > 0.97


# Repetition, length, overlong.


def test_repetition_is_the_share_of_runs_that_were_there_before():
  assert text_terms.repetition('a b c d e f g h i j') == 0.0
  assert text_terms.repetition('too short') == 0.0
  words = [str(i) for i in range(20)]
  # 40 words have 33 runs of 8; the second half's 13 whole runs were there before.
  assert text_terms.repetition(' '.join(words * 2)) == near(-13 / 33)
  assert text_terms.repetition('好的 ' * 1000) < -0.99
  assert text_terms.repetition('a b a b', '2') == near(-1 / 3)


def test_length_prefers_the_short_among_the_correct_and_rewards_no_wrong_one():
  tokens, correct = np.array([[10, 20, 30, 20], [5, 5, 5, 5]]), np.array([[1, 1, 1, 0], [1, 0, 1, 0]])
  np.testing.assert_allclose(terms.length(tokens, correct), [[0.5, 0, -0.5, 0], [0, 0, 0, 0]])
  np.testing.assert_allclose(terms.length(tokens, 1 - correct)[0], [0, 0, -0.5, 0])


def test_overlong_falls_over_the_cache_as_in_dapo():
  tokens = np.array([[0, 16_384, 18_432, 20_480]])
  np.testing.assert_allclose(terms.overlong(tokens, 20_480), [[0, 0, -0.5, -1]])  # a fifth of 20,480 is 4,096
  np.testing.assert_allclose(terms.overlong(tokens, 20_480, '2048'), [[0, 0, 0, -1]])
  np.testing.assert_allclose(terms.overlong(np.array([[3, 4]]), 4), [[0, -1]])


# Weights.


def test_weights_are_read_in_order_and_those_of_zero_are_left_out():
  assert terms.parse(' accuracy=1, format=0.1 ,language:zh=0.5,repetition=0,') == (
      terms.Term('accuracy', '', 1.0), terms.Term('format', '', 0.1), terms.Term('language', 'zh', 0.5))  # fmt: skip


@pytest.mark.parametrize('text, why', [
    ('acuracy=1', "no term 'acuracy': did you mean 'accuracy'"), ('xyz=1', 'use some of accuracy, format'),
    ('accuracy', "'accuracy' has no"),
    ('accuracy=one', 'has no number'), ('accuracy=nan', 'has no number'),
    ('accuracy=1,accuracy=2', 'stands there twice'), ('', 'no term with a weight'),
    ('format:x=1', "'format' takes no argument"), ('language:klingon=1', "'klingon' is not known"),
    ('repetition:0=1', 'from 1 to 99'),
    ('overlong:-3=1', 'no whole number'), ('format=0', 'no term with a weight'),
])  # fmt: skip
def test_bad_weights_are_refused_with_the_remedy(text, why):
  with pytest.raises(ValueError, match=why):
    terms.parse(text)


def grade(verdict: str, form: float = 1.0, scores: tuple[float, ...] = ()) -> pool.Grade:
  return pool.Grade(verdict, float(verdict == CORRECT), form, 0.0, scores)


def test_the_reward_is_the_weighted_sum_and_nothing_where_the_reference_cannot_be_read():
  weighted = terms.parse('accuracy=1,format=0.1,language=0.5,overlong:10=2')
  grades = [grade(CORRECT, 1, (1.0,)), grade(WRONG, 0, (0.5,)), grade(TIMEOUT, 1, (0.0,)), grade(CORRECT, 1, (1.0,)),
            *[grade(UNPARSABLE_REFERENCE, 1, (1.0,))] * 4]  # fmt: skip
  got = terms.rewards(weighted, grades, np.array([[5, 5, 90, 95], [5, 5, 5, 5]]), 100)
  np.testing.assert_allclose(got.reward, [[1.6, 0.25, 0.1, 0.6], [0, 0, 0, 0]], rtol=1e-6)
  np.testing.assert_array_equal(got.kept, [[True] * 4, [False] * 4])
  assert list(got.scores) == ['accuracy', 'format', 'language', 'overlong:10'] and got.reward.dtype == np.float32
  np.testing.assert_allclose(got.scores['overlong:10'][0], [0, 0, 0, -0.5])


def test_workers_score_text_in_the_language_of_the_question_even_where_the_answer_hangs():
  weighted = terms.parse('accuracy=1,language=1,repetition=1')
  assert terms.for_workers(weighted, ZH) == ('language:zh', 'repetition')
  assert terms.for_workers(weighted, EN) == ('language:en', 'repetition')
  items = [pool.Item('math', f'<think>{thought}</think><answer>{answer}</answer>', '18',
                     terms.for_workers(weighted, question))
           for thought, answer, question in ((ZH, '18', ZH), (EN, '18', ZH), (EN, '17', EN), (ZH, '9^{9^{9^{9}}}', ZH))]
  items.append(pool.Item('math', 'no thinking, 18', '18', ('language:en',)))
  with pool.RewardPool(workers=1, timeout_s=3.0) as graders:
    grades = graders.grade(items)
  assert [g.verdict for g in grades] == [CORRECT, CORRECT, WRONG, TIMEOUT, CORRECT]
  assert [g.scores for g in grades] == [(1.0, 0.0), (0.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.0,)]


def test_reward_workers_never_load_jax():
  source = (pathlib.Path(terms.__file__).parent / 'worker.py').read_text()
  assert 'terms import' not in source.replace('text_terms', '') and 'import jax' not in source
