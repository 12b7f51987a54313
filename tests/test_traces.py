"""Traces: what is read and refused, what an example is made of, and how examples are packed into rows."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import vocabularies

from moe_rl.config import base_config
from moe_rl.data.packing import WINDOW, shuffled_rows
from moe_rl.data.pipeline import TraceRows, batches
from moe_rl.data.problem_files import BadRecord, DataError, Float
from moe_rl.data.templates import opening, prompt_ids, render
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.data.traces import Example, Trace, continuation, example, load_examples, read_traces

TINY = load_tokenizer('tiny')


def write(path, *records) -> str:
  path.write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in records))
  return str(path)


def trace(n: int, **others) -> dict:
  return {'question': f'{n}+1=?', 'response': f'<think>{n}+1={n + 1}</think><answer>{n + 1}</answer>', **others}


# Files.


def test_traces_of_several_files_come_in_order_with_what_else_they_hold(tmp_path):
  a = write(tmp_path / 'a.jsonl', trace(1, id=7, accuracy=1.0, source={'step': 20}), '', trace(2))
  b = write(tmp_path / 'b.jsonl', *map(trace, range(10, 20)))
  traces = read_traces(f'{a}, {b}@2,{a}@1')
  assert [t.question for t in traces] == ['1+1=?', '2+1=?', '10+1=?', '11+1=?', '1+1=?']
  assert traces[0] == Trace('1+1=?', '<think>1+1=2</think><answer>2</answer>', f'{a}:1',
                            {'id': 7, 'accuracy': Float('1.0'), 'source': {'step': 20}})
  assert traces[1].where == f'{a}:3'
  assert read_traces([a]) == read_traces(a)


def test_bad_lines_are_named_with_the_reason(tmp_path):
  path = write(tmp_path / 'a.jsonl', trace(1), '{"question": "x"', {'question': 'x'}, '["x"]', trace(2, response=' '),
               trace(3, question=None), trace(4))
  with pytest.raises(DataError) as error:
    read_traces(path)
  message = str(error.value)
  assert '5 of 7 traces cannot be used' in message
  for part in (':2: is not valid JSON', ":3: field 'response' is missing", ':4: is no JSON object',
               ":5: field 'response' is empty", ":6: field 'question' is null"):
    assert f'{path}{part}' in message
  assert len(read_traces(f'{path}@1')) == 1  # what comes later is not looked at


@pytest.mark.parametrize('paths, part', [('', "''"), ('a.jsonl,', "''"), ('a.jsonl@0', "'a.jsonl@0'")])
def test_a_path_that_names_no_trace_is_refused(paths, part):
  with pytest.raises(ValueError, match=f'{part} names no trace'):
    read_traces(paths)


def test_no_such_file_is_told(tmp_path):
  write(tmp_path / 'traces.jsonl', trace(1))
  with pytest.raises(DataError, match="there is no such file.*nearest: 'traces.jsonl'"):
    read_traces(str(tmp_path / 'trace.jsonl@5'))


# Examples.


def test_an_example_is_prompt_response_and_end():
  e = example('short', TINY, Trace(**trace(3)), '')
  prompt = render('short', '3+1=?')
  assert TINY.decode(e.ids[:e.prompt]) == prompt and e.prompt == len(TINY.encode(prompt))
  assert TINY.decode(e.ids[e.prompt:]) == trace(3)['response']
  # Four tags of a token each, six characters, the end.
  assert e.ids.dtype == np.int32 and len(e.ids) - e.prompt == 4 + 6 + 1 and e.ids[-1] == TINY.eos_id


@pytest.fixture(scope='module')
def deepseek(tmp_path_factory):
  return load_tokenizer(vocabularies.write(tmp_path_factory.mktemp('vocabulary') / 'deepseek', 'deepseek'))


@pytest.mark.parametrize('template', ['r1', 'r1_think', 'chat', 'r1_zero'])
def test_a_thought_is_opened_once_whoever_opens_it(deepseek, template):
  t, opened = deepseek, opening(template, deepseek)
  assert opened == ('<think>\n' if template in ('r1_think', 'chat') else '')
  asked = Trace('What of <think> and <｜User｜>?', '<think>\n2+3=5</think>\n<answer>5</answer>')
  e = example(template, t, asked, opened)
  assert list(e.ids[:e.prompt]) == prompt_ids(template, t, asked.question)
  assert (e.ids[e.prompt:] == t.special['</think>']).sum() == 1 and e.ids[-1] == t.eos_id
  assert (e.ids[e.prompt:] == t.special['<think>']).sum() == (0 if opened else 1)
  if template in ('r1', 'r1_think'):  # what the question says stays text
    assert (e.ids == t.special['<think>']).sum() == (e.ids == t.special[vocabularies.USER]).sum() == 1
  assert t.decode(e.ids).endswith('<think>\n2+3=5</think>\n<answer>5</answer>')


def test_the_opening_is_cut_off_and_a_response_without_a_thought_cannot_follow_one():
  assert continuation('<think>\na</think>b', '<think>\n') == 'a</think>b'
  assert continuation('<think>a</think>b', '<think>\n') == 'a</think>b'
  assert continuation('a</think>b', '<think>\n') == 'a</think>b'
  assert continuation('b', '') == 'b'
  with pytest.raises(BadRecord, match='has no thought, and the prompt opens one'):
    continuation('b', '<think>\n')


def sft_config(path: str, **sft):
  config = base_config('tiny', 'sft')
  config.sft.update(sft | {'path': path})
  return config


def test_long_examples_are_left_out_counted_and_named(tmp_path):
  path = write(tmp_path / 'a.jsonl', trace(1), trace(1234), trace(2), trace(12345678))
  lengths = [len(e.ids) for e in load_examples(sft_config(path), TINY).kept]
  assert len(lengths) == 4 and max(lengths) == lengths[3]
  found = load_examples(sft_config(f'{path}@9', row_tokens=lengths[0]), TINY)
  assert (len(found.kept), found.left_out, found.longest) == (2, 2, lengths[0])
  assert found.notes == [
    f'{path} has 4 traces, not the 9 that config.sft.path asks for', f'2 examples of {path}@9',
    f'left out 2 examples longer than config.sft.row_tokens {lengths[0]}; the longest is {path}:4 with {lengths[3]} '
    'tokens']
  assert found.tokens == 2 * lengths[0] and found.response_tokens == 2 * 11
  with pytest.raises(ValueError, match=rf'longer than config.sft.row_tokens 5 \(the shortest has {lengths[0]} tokens'):
    load_examples(sft_config(path, row_tokens=5), TINY)


def test_a_template_that_opens_a_thought_names_the_lines_that_have_none(tmp_path, deepseek):
  path = write(tmp_path / 'a.jsonl', trace(1), trace(2, response='3'))
  config = sft_config(path)
  config.template = 'r1_think'
  with pytest.raises(DataError, match=f'1 of 2 traces cannot be used:\n  {path}:2: its response has no thought'):
    load_examples(config, deepseek)


# Rows.


def examples_of(lengths) -> list[Example]:
  """Ids that tell the example and the place: 100 n + t."""
  return [Example(np.arange(100 * n, 100 * n + length, dtype=np.int32), 1 + n % (length - 1), str(n))
          for n, length in enumerate(lengths)]


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.integers(2, 12), min_size=1, max_size=30), st.integers(12, 30), st.integers(1, 3),
                  st.integers(1, 5))
def test_every_epoch_has_every_example_once_and_whole(lengths, row_tokens, epochs, rows_per_step):
  examples = examples_of(lengths)
  rows = TraceRows(examples, 3, epochs, rows_per_step, row_tokens)
  assert len(rows) == rows.steps * rows_per_step
  seen = []
  for i in range(len(rows)):
    row, at = rows[i], 0
    assert {k: (v.dtype, v.shape) for k, v in row.items()} == {
      **dict.fromkeys(('ids', 'positions', 'segments'), (np.int32, (row_tokens,))), 'answer': (bool, (row_tokens,))}
    for segment in range(1, row['segments'].max() + 1):
      cells = np.flatnonzero(row['segments'] == segment)
      np.testing.assert_array_equal(cells, at + np.arange(len(cells)))  # side by side
      n = row['ids'][at] // 100
      np.testing.assert_array_equal(row['ids'][cells], examples[n].ids)
      np.testing.assert_array_equal(row['positions'][cells], np.arange(lengths[n]))
      np.testing.assert_array_equal(row['answer'][cells], np.arange(lengths[n]) >= examples[n].prompt)
      seen.append(n)
      at += len(cells)
    assert not any(v[at:].any() for v in row.values())
  for epoch in range(epochs):  # one after the other: nothing of an epoch is lost or comes in the next
    assert sorted(seen[epoch * len(lengths):(epoch + 1) * len(lengths)]) == list(range(len(lengths)))
  assert rows[len(rows) - rows_per_step]['segments'].any()  # no step is empty


def test_the_order_is_that_of_seed_and_epoch_and_rows_are_well_filled():
  lengths = np.random.default_rng(0).integers(10, 101, 3 * WINDOW)
  one, two = (shuffled_rows(lengths, 256, f'traces/0/{epoch}') for epoch in (0, 1))
  assert one == shuffled_rows(lengths, 256, 'traces/0/0') and one != two
  assert one != shuffled_rows(lengths, 256, 'traces/1/0')
  filled = np.array([lengths[row].sum() for row in one])
  # First-fit decreasing leaves little but each window's last row: 3 of about 660.
  assert filled.max() <= 256 and filled.mean() / 256 > 0.97
  longest = np.array([lengths[row].max() for row in one])
  # Long and short come mixed: the means of both halves differ by no more than four of their standard errors.
  half, error = len(one) // 2, longest.std() * np.sqrt(4 / len(one))
  assert abs(longest[:half].mean() - longest[half:].mean()) < 4 * error


def test_the_rows_of_a_resumed_iterator_go_on():
  rows = TraceRows(examples_of([5, 9, 4, 7, 8, 3]), 0, 2, 2, 12)
  whole = batches(rows, 2)
  wanted = [next(whole)['ids'] for _ in range(rows.steps)]
  begun = batches(rows, 2)
  next(begun)
  again = batches(rows, 2)
  again.set_state(json.loads(json.dumps(begun.get_state())))
  for ids in wanted[1:]:
    np.testing.assert_array_equal(next(again)['ids'], ids)
