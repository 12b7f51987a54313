"""Templates, tokenizer, procedural tasks, the corpus, and the pipelines that feed training: what each promises."""

import dataclasses
import json
import random
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece

from moe_rl.config import base_config
from moe_rl.data import tokenizer as tokenizers
from moe_rl.data.corpus import Mix, document
from moe_rl.data.pipeline import CorpusRows, batches
from moe_rl.data.problems import DataError
from moe_rl.data.prompts import load_prompts
from moe_rl.data.tasks import Chain, Problems, held_out
from moe_rl.data.templates import render
from moe_rl.data.tokenizer import load_tokenizer, train_tiny

CHAIN = Chain()
TOKENIZER = load_tokenizer('tiny')

# Templates.


def test_the_r1_zero_template_is_the_papers_table_one_word_for_word():
  assert render('r1_zero', 'What is 2+3?') == (
    'A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: What is 2+3?. Assistant:')  # noqa: E501


def test_the_short_template_is_two_tokens_around_the_question():
  ids = TOKENIZER.encode(render('short', '1+2=?'))
  assert len(ids) == 2 + len('1+2=?')
  assert (TOKENIZER.decode(ids[:1]), TOKENIZER.decode(ids[-1:])) == ('User:', 'Assistant:')


@pytest.mark.parametrize('template', ['short', 'r1_zero'])
@pytest.mark.parametrize('question', ['{prompt}', '{}', 'f(x) = {x^2}', '%s \\1'])
def test_a_questions_braces_are_left_alone(template, question):
  assert render(template, question).count(question) == 1


def test_an_unknown_template_is_refused_with_the_names_there_are():
  with pytest.raises(ValueError, match="config.template 'r1': use one of r1_zero, short"):
    render('r1', '')


# The tokenizer.

TEXT = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\u2581'))


@hypothesis.settings(max_examples=500, deadline=None, derandomize=True)
@hypothesis.given(TEXT)
@hypothesis.example('\0')
@hypothesis.example('  two  spaces, \t tab \r\n and lines\n\n')
@hypothesis.example('<pad><eos><unk><0x41> <think')
@hypothesis.example('é é ﬁ Ａ 中 😀 \u200d')  # nothing is normalised
def test_any_text_comes_back_from_its_tokens_unchanged(text):
  ids = TOKENIZER.encode(text)
  assert TOKENIZER.decode(ids) == text
  assert not {TOKENIZER.pad_id, TOKENIZER.eos_id} & set(ids)  # text cannot end a document or pass for padding
  assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


@pytest.mark.parametrize('piece', tokenizers.WHOLE)
def test_tags_and_turning_words_are_single_tokens_wherever_they_stand(piece):
  (own,) = TOKENIZER.encode(piece)
  for text in (f'1{piece}2', f' {piece} ', f'{piece}{piece}', f'x{piece}'):
    assert TOKENIZER.encode(text).count(own) == text.count(piece)


def test_every_digit_is_a_token_of_its_own():
  digits = [TOKENIZER.encode(d) for d in '0123456789']
  assert all(len(ids) == 1 for ids in digits) and len({ids[0] for ids in digits}) == 10
  assert TOKENIZER.encode('31415') == [digits[int(d)][0] for d in '31415']


def test_what_has_no_piece_falls_back_to_its_bytes():
  assert len(TOKENIZER.encode('中')) == len('中'.encode()) == 3
  assert TOKENIZER.decode(TOKENIZER.encode('中')[:2]).strip('\ufffd') == ''  # a broken sequence shows as such


def test_pad_and_end_of_text_give_no_text_and_fit_the_tiny_model():
  ids = TOKENIZER.encode('1+2')
  assert TOKENIZER.decode([*ids, TOKENIZER.eos_id, TOKENIZER.pad_id, 10**6]) == '1+2'
  assert (TOKENIZER.pad_id, TOKENIZER.eos_id) == (0, 1)  # the sampler fills with 0 after the end
  assert TOKENIZER.vocab_size <= base_config('tiny').model.vocab_size


def test_training_the_tokenizer_again_gives_the_shipped_pieces_exactly():
  shipped, trained = (sentencepiece.SentencePieceProcessor(model_proto=m)
                      for m in (tokenizers.TINY.read_bytes(), train_tiny()))

  def pieces(sp):
    return [(sp.id_to_piece(i), sp.is_control(i), sp.is_byte(i)) for i in range(sp.vocab_size())]
  assert pieces(trained) == pieces(shipped)


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
  with pytest.raises(ValueError, match="config.tokenizer '.*missing.model'.*use 'tiny' or the path of a .model file"):
    load_tokenizer(str(tmp_path / 'missing.model'))
  (tmp_path / 'bad.model').write_bytes(b'not a model')
  with pytest.raises(ValueError, match='bad.model: not a sentencepiece model'):
    load_tokenizer(str(tmp_path / 'bad.model'))


# Chains.


def totals_of(question: str) -> list[int]:
  """Running totals, read from the question alone."""
  assert re.fullmatch(r'[1-9]([+-][1-9])*=\?', question), question
  return [sum(int(n) for n in re.findall(r'[+-]?\d', question[:end])) for end in range(1, len(question) - 1, 2)]


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**31 - 2), st.sampled_from(['train', 'held_out']), st.integers(0, 3),
                  st.integers(2, 5), st.integers(0, 6), st.integers(18, 60))
def test_a_chain_keeps_its_limits_and_its_answer_is_right(index, split, seed, fewest, more, max_total):
  problem = Chain(seed, fewest, fewest + more, max_total).problem(split, index)
  totals = totals_of(problem.question)
  assert fewest <= len(totals) <= fewest + more
  assert min(totals) >= 0 and max(totals) <= max_total
  assert problem.reference == str(totals[-1]) == str(eval(problem.question[:-2]))
  assert (problem.id, problem.kind) == (index, 'integer')


def test_a_chain_problem_is_addressed_by_seed_split_and_index_alone():
  first = [CHAIN.problem('train', i) for i in range(50)]
  assert [Chain().problem('train', i) for i in reversed(range(50))] == first[::-1]
  # Written down: the same on every machine and Python.
  assert first[0].question == '1+3+2+5-6-2=?'
  others = [dataclasses.replace(CHAIN, seed=1).problem('train', i) for i in range(50)]
  assert len({p.question for p in first + others}) >= 95


def test_no_held_out_question_is_a_training_question():
  train = {CHAIN.problem('train', i).question for i in range(5000)}
  kept_out = {dataclasses.replace(CHAIN, seed=i % 3).problem('held_out', i).question for i in range(5000)}
  assert len(train) > 4000 and len(kept_out) > 4000 and not train & kept_out


def test_an_eighth_of_the_questions_is_held_out():
  rng = random.Random(0)
  share = np.mean([held_out(CHAIN.draw(rng)[0]) for _ in range(4000)])
  assert abs(share - 1 / 8) < 4 * (1 / 8 * 7 / 8 / 4000)**0.5  # four standard errors


def test_an_unknown_split_is_refused():
  with pytest.raises(ValueError, match="split 'test': use one of train, held_out"):
    CHAIN.problem('test', 0)


# The corpus.

WELL_FORMED = re.compile(r'User:([^A]*=\?)Assistant:<think>([^<]*)</think><answer>(\d+)</answer>')


PASSED = re.compile(' then | check |然后|检查')  # between one sum and the next


def style_of(text: str) -> str:
  if not text.startswith('User:'):
    return 'facts'
  match = WELL_FORMED.fullmatch(text)
  if not match:
    return 'malformed'
  return 'steps' if '=' in match[2] else 'direct'


@pytest.fixture(scope='module')
def documents():
  rng = random.Random(1)
  return [document(CHAIN, Mix(), rng) for _ in range(6000)]


def test_the_styles_have_the_shares_of_the_mix(documents):
  styles, mix = [style_of(d) for d in documents], Mix()
  for style in ('direct', 'steps', 'malformed', 'facts'):
    share = getattr(mix, style) if style != 'facts' else 1 - mix.direct - mix.steps - mix.malformed
    # Four standard errors of a binomial: one right corpus of 4,000 would fail.
    assert abs(styles.count(style) / 6000 - share) < 4 * (share * (1 - share) / 6000)**0.5, style


def test_slips_second_passes_and_guesses_have_the_rates_of_the_mix(documents):
  mix, found = Mix(), [WELL_FORMED.fullmatch(d) for d in documents if style_of(d) in ('direct', 'steps')]
  worked = [m for m in found if '=' in m[2]]
  # A small answer minus three may be held at 0, and so be right: only answers above 3 tell.
  guesses = [int(m[3]) != totals_of(m[1])[-1] for m in found if '=' not in m[2] and totals_of(m[1])[-1] > 3]
  checked = [bool(re.search(' check |检查', m[2])) for m in worked]
  steps = [eval(re.split(' wait |等等', s)[0].replace('=', '!=')) for m in worked for s in PASSED.split(m[2])]
  for name, events, rate in (('check', checked, mix.check), ('guess', guesses, mix.guess), ('slip', steps, mix.slip)):
    # A slip below 0 is held there and may be right, so the rate of slips is up to a tenth lower.
    slack = 4 * (rate * (1 - rate) / len(events))**0.5 + (rate / 10 if name == 'slip' else 0)
    assert len(events) > 500 and abs(np.mean(events) - rate) < slack, name


def test_working_without_a_slip_gives_the_right_answer(documents):
  for match in filter(None, map(WELL_FORMED.fullmatch, documents)):
    steps = PASSED.split(match[2])
    once = '=' in match[2] and not re.search('check|wait|检查|等等', match[2])
    if once and all(eval(s.replace('=', '==')) for s in steps):
      assert [int(s.split('=')[1]) for s in steps] == totals_of(match[1])[1:]
      assert int(match[3]) == totals_of(match[1])[-1]


def test_worked_documents_are_english_chinese_or_both(documents):
  '''Two links or more tell: a mixed document of k links is all of one language in 2^(1-k) of the cases.'''
  found = [re.findall(' (?:then|wait|check) |然后|等等|检查', m[2]) for m in map(WELL_FORMED.fullmatch, documents) if m]
  found = [links for links in found if len(links) >= 2]
  both = [any(x.isascii() for x in links) and not all(x.isascii() for x in links) for links in found]
  expected = np.mean([Mix().mixed * (1 - 0.5**(len(links) - 1)) for links in found])
  assert len(found) > 1000 and abs(np.mean(both) - expected) < 4 * (expected * (1 - expected) / len(found))**0.5
  english = np.mean([links[0].isascii() for links, b in zip(found, both, strict=True) if not b])
  assert abs(english - 0.5) < 4 * (0.25 / (len(found) - sum(both)))**0.5


def test_facts_are_true_and_within_the_chains_range(documents):
  sheets = [d.split(',') for d in documents if style_of(d) == 'facts']
  assert len(sheets) > 50
  for fact in sum(sheets, []):
    assert eval(fact.replace('=', '==')) and 0 <= int(fact.split('=')[1]) <= CHAIN.max_total


def test_no_document_is_on_a_held_out_question(documents):
  questions = [re.match(r'User:(.*?)Assistant:', d)[1] for d in documents if style_of(d) != 'facts']
  assert len(questions) > 5000 and not any(map(held_out, questions))


def test_a_document_depends_on_its_random_state_alone():
  assert [document(CHAIN, Mix(), random.Random(i)) for i in range(20)] == [
    document(Chain(), Mix(), random.Random(i)) for i in range(20)]


def test_shares_beyond_one_are_refused():
  with pytest.raises(ValueError, match=r'config.corpus: direct \+ steps \+ malformed is 1.1, must not exceed 1'):
    Mix(direct=0.5, steps=0.5, malformed=0.1)


# Rows and batches.


def corpus_rows(rows=64, row_tokens=128, seed=3):
  return CorpusRows(CHAIN, Mix(), TOKENIZER, seed, rows, row_tokens)


def test_a_row_of_the_corpus_is_full_and_its_segments_are_whole_documents():
  source = corpus_rows()
  for index in range(16):
    row = source[index]
    assert all(v.shape == (128,) and v.dtype == np.int32 for v in row.values())
    assert row['segments'][0] == 1 and set(np.diff(row['segments'])) <= {0, 1}  # full: no padding, counted up
    count = row['segments'][-1]
    rng = random.Random(f'corpus/3/{index}')
    for segment in range(1, count + 1):
      cells = row['segments'] == segment
      np.testing.assert_array_equal(row['positions'][cells], np.arange(cells.sum()))
      whole = [*TOKENIZER.encode(document(CHAIN, Mix(), rng)), TOKENIZER.eos_id]
      np.testing.assert_array_equal(row['ids'][cells], whole[:cells.sum()])
      assert cells.sum() == len(whole) or segment == count  # only the last one is cut


def test_a_row_of_the_corpus_depends_on_seed_and_index_alone():
  source = corpus_rows()
  late = source[40]
  for other in (corpus_rows(), corpus_rows(rows=1000)):
    np.testing.assert_equal(other[40], late)
  for other in (source[41], corpus_rows(seed=4)[40]):
    assert (other['ids'] != late['ids']).any()
  assert len(source) == 64


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize('as_list', [True, False])
@pytest.mark.parametrize('shuffle_seed', [None, 5])
def test_a_restored_position_gives_the_batches_that_would_have_followed(shuffle_seed, as_list):
  def fresh():
    source = list(range(100, 123)) if as_list else corpus_rows(rows=23, row_tokens=16)
    return batches(source, 4, shuffle_seed=shuffle_seed, as_list=as_list)
  whole = take(fresh(), 15)  # beyond the second epoch
  iterator = fresh()
  take(iterator, 4)
  state = iterator.get_state()
  np.testing.assert_equal(take(iterator, 3), whole[4:7])
  iterator.set_state(state)  # back in the same iterator
  np.testing.assert_equal(take(iterator, 11), whole[4:])
  resumed = fresh()
  resumed.set_state(json.loads(json.dumps(state)))  # as a checkpoint keeps it, in another process
  np.testing.assert_equal(take(resumed, 11), whole[4:])


def test_a_shuffled_epoch_has_every_item_once_and_each_epoch_its_own_order():
  drawn = sum(take(batches(list(range(12)), 4, shuffle_seed=0, as_list=True), 6), [])
  assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
  assert drawn[:12] != drawn[12:] and drawn[:12] != list(range(12))
  assert sum(take(batches(list(range(12)), 4, as_list=True), 3), []) == list(range(12))  # no seed: in order


def test_two_processes_split_each_batch_between_them():
  def stream(shard):
    return take(batches(list(range(10)), 4, shuffle_seed=2, as_list=True, shard=shard), 9)
  for whole, first, second in zip(stream((0, 1)), stream((0, 2)), stream((1, 2)), strict=True):
    assert len(first) == len(second) == 2
    assert sorted(first + second) == sorted(whole)


def test_an_endless_source_of_prompts_can_be_batched():
  source = Problems(lambda i: CHAIN.problem('train', i), 2**31 - 1)
  assert [p.id for p in sum(take(batches(source, 3, as_list=True), 2), [])] == list(range(6))


def test_a_batch_that_does_not_divide_or_exceeds_its_source_is_refused():
  with pytest.raises(ValueError, match='a batch of 5 does not divide over 2 processes: use a multiple of 2'):
    batches(list(range(10)), 5, shard=(0, 2))
  with pytest.raises(ValueError, match='a batch of 11 is larger than its source of 10: use a smaller batch'):
    batches(list(range(10)), 11)


# Prompts.


def file_config(tmp_path, questions, **changes):
  path = tmp_path / 'train.jsonl'
  path.write_text(''.join(json.dumps({'question': q, 'answer': str(i)}) + '\n' for i, q in enumerate(questions)))
  c = base_config('tiny')
  c.task.update({'name': 'jsonl', 'path': str(path)})
  c.eval.problems = 2
  c.sampling.max_prompt_tokens = 12  # 'User:' and 'Assistant:' are one each
  c.update_from_flattened_dict(changes)
  return c


def test_too_long_prompts_are_left_out_counted_and_named(tmp_path):
  prompts = load_prompts(file_config(tmp_path, ['1+1=?', 'x' * 11, 'y' * 10, 'z' * 40, '2+2=?', 'w' * 13]), TOKENIZER)
  assert [prompts.train[i].problem.id for i in range(len(prompts.train))] == [0, 2]  # 10 characters and 2 tags just fit
  assert [p.problem.id for p in prompts.held_out] == [4]  # the last two of the file are held out
  assert prompts.left_out == 3 and prompts.finite
  assert '2 training and 1 held-out prompts of ' in prompts.notes[0]
  assert prompts.longest == 12
  limit = 'longer than config.sampling.max_prompt_tokens 12; the longest is problem'
  assert prompts.notes[1:] == [
    f'left out 2 training prompts {limit} 3 with 42 tokens', f'left out 1 held-out prompts {limit} 5 with 15 tokens']


def test_a_prompt_is_its_rendered_template_token_for_token(tmp_path):
  c = file_config(tmp_path, ['2+3=?', 'a', 'b'], **{'template': 'r1_zero', 'sampling.max_prompt_tokens': 600})
  prompt = load_prompts(c, TOKENIZER).train[0]
  assert TOKENIZER.decode(prompt.ids) == render('r1_zero', '2+3=?')
  assert prompt.problem.reference == '0'


def test_a_file_of_too_long_prompts_alone_is_refused_with_the_limit_to_raise(tmp_path):
  wanted = r'every prompt is longer than config.sampling.max_prompt_tokens 12 \(the shortest has 32 tokens\): raise it'
  with pytest.raises(ValueError, match=wanted):
    load_prompts(file_config(tmp_path, ['x' * 30, 'y' * 31, '1', '2']), TOKENIZER)
  with pytest.raises(ValueError, match=wanted):
    load_prompts(file_config(tmp_path, ['1', '2', 'x' * 30, 'y' * 31]), TOKENIZER)


def test_a_file_with_too_few_problems_to_hold_some_out_is_refused(tmp_path):
  with pytest.raises(ValueError, match='has 2 problems, not more than config.eval.problems 2: lower it, or give'):
    load_prompts(file_config(tmp_path, ['1', '2']), TOKENIZER)
  with pytest.raises(DataError, match='there is no such file'):
    load_prompts(file_config(tmp_path, ['1', '2'], **{'task.path': str(tmp_path / 'other.jsonl')}), TOKENIZER)


def test_a_file_of_its_own_for_evaluation_leaves_all_training_problems_in(tmp_path):
  (tmp_path / 'test.jsonl').write_text('{"question": "9", "answer": "9"}\n' * 5)
  c = file_config(tmp_path, ['1', '2', '3'], **{'task.eval_path': str(tmp_path / 'test.jsonl')})
  prompts = load_prompts(c, TOKENIZER)
  assert len(prompts.train) == 3 and [p.problem.question for p in prompts.held_out] == ['9', '9']


def test_procedural_prompts_are_endless_and_their_evaluation_is_held_out():
  prompts = load_prompts(base_config('tiny'), TOKENIZER)
  assert not prompts.finite and prompts.left_out == 0 and len(prompts.held_out) == 256
  assert all(held_out(p.problem.question) for p in prompts.held_out)
  assert not any(held_out(prompts.train[i].problem.question) for i in range(256))
  assert max(len(p.ids) for p in prompts.held_out) <= 2 + 2 * 8 + 1  # two tags, 8 terms, 7 signs, '=?'


def test_a_prompt_limit_below_the_longest_chain_is_refused_before_any_is_drawn():
  c = base_config('tiny')
  c.sampling.max_prompt_tokens = 18
  with pytest.raises(ValueError, match=r'max_prompt_tokens 18 is too short for config.task.max_terms 8 \(prompts of up '
                                       r'to 19 tokens\): raise it'):
    load_prompts(c, TOKENIZER)
  c.sampling.max_prompt_tokens = 19
  load_prompts(c, TOKENIZER)
