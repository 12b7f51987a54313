"""Rejection sampling: what becomes a trace, what is left out for which reason, and the stage interrupted."""

import json
import shutil
import types

import pytest
import runs

from moe_rl.data.traces import read_traces
from moe_rl.rl.rewards.verdicts import CORRECT, TIMEOUT, WRONG
from moe_rl.stages.sample import REASONS, Selection, write_traces

# Three batches of four prompts, eight samples each.
CHANGES = {'sample': dict(prompts=12, samples=8), 'sampling': dict(max_new_tokens=24, batch_samples=32)}


def sample(response='<think>a</think><answer>1</answer>', **changes) -> dict:
  return dict(question='q', response=response, stopped=True, verdict=CORRECT, format=1.0, language=1.0, tokens=9,
              terms={'repetition': 0.0}) | changes


def selection(**changes) -> Selection:
  return Selection(types.SimpleNamespace(**dict(
    well_formed=True, min_language=0.9, min_repetition=-0.2, keep='all') | changes))


def test_each_sample_is_kept_or_left_out_for_the_first_reason_that_holds():
  group = [sample('a'), sample('b', stopped=False, verdict=WRONG), sample('c', verdict=WRONG, format=0.0),
           sample('d', verdict=TIMEOUT), sample('e', format=0.0, language=0.0), sample('f', language=0.89),
           sample('g', language=0.9), sample('h', terms={'repetition': -0.21}), sample('a'), sample('i', tokens=5)]
  select = selection()
  assert [a['response'] for a in select(group)] == ['a', 'g', 'i']
  assert {why: n for why, n in select.left_out.items() if n} == {
    'truncated': 1, 'wrong': 1, 'timeout': 1, 'format': 1, 'language': 1, 'repetition': 1, 'duplicate': 1}
  assert select.samples == len(group) == select.kept + sum(select.left_out.values())
  assert select([sample('a'), sample('x', verdict=WRONG)]) == []  # asked and answered before
  assert (select.prompts_without, select.left_out['duplicate']) == (1, 2)
  assert [a['response'] for a in select([sample('a', question='another')])] == ['a']


@pytest.mark.parametrize('keep, wanted', [('all', 'abcd'), ('one', 'a'), ('shortest', 'b'), ('longest', 'c')])
def test_of_a_prompts_good_samples_those_are_kept_that_are_asked_for(keep, wanted):
  select = selection(keep=keep)
  kept = select([sample(text, tokens=n) for text, n in (('a', 5), ('b', 3), ('c', 8), ('d', 3))])
  assert ''.join(a['response'] for a in kept) == wanted
  assert select.left_out['not_chosen'] == 4 - len(wanted)


def test_traces_as_array_record_are_those_of_the_lines(tmp_path):
  pytest.importorskip('array_record')
  answers = [sample(text) | {'reference': '1', 'kind': 'math', 'id': 0, 'sample': 0, 'accuracy': 1.0}
             for text in ('a', '中')]
  write_traces(tmp_path / 'traces.jsonl', [answers], selection(), 'task', {'checkpoint': 'here'})
  lines, records = (read_traces(f'{tmp_path}/traces.{end}') for end in ('jsonl', 'array_record'))
  assert [(t.response, t.others) for t in lines] == [(t.response, t.others) for t in records]
  assert [t.response for t in lines] == ['a', '中']


def test_without_tags_a_sample_may_be_good_if_the_config_says_so():
  assert not selection()([sample('18', format=0.0)]) and selection(well_formed=False)([sample('18', format=0.0)])


@pytest.fixture(scope='module')
def sampled(tmp_path_factory):
  path = tmp_path_factory.mktemp('sampled') / 'run'
  runs.finish(runs.start('rejection.py', CHANGES, path))
  return path


def test_traces_are_the_good_samples_and_the_reasons_add_up(sampled):
  summary, traces = runs.summary(sampled), runs.lines(sampled / 'traces.jsonl')
  answers = {(a['id'], a['sample']): a for a in runs.lines(sampled / 'answers.jsonl')}
  assert summary['samples'] == 96 == len(answers) == summary['kept'] + sum(summary['left_out'].values())
  assert summary['kept'] == len(traces) > 0 and list(summary['left_out']) == list(REASONS)
  assert summary['left_out']['wrong'] > 0 and summary['left_out']['truncated'] > 0
  assert summary['prompts_without_a_trace'] == 12 - len({trace['id'] for trace in traces})
  assert summary['tokens'] == sum(a['tokens'] for a in answers.values())
  for trace in traces:
    a = answers[trace['id'], trace['source']['sample']]
    assert a['verdict'] == CORRECT and a['stopped'] and a['format'] == 1.0 and a['language'] >= 0.9
    assert trace['response'] == a['response'] == a['response'].strip() and trace['response'].startswith('<think>')
    assert list(trace) == ['question', 'response', 'reference', 'kind', 'task', 'id', 'accuracy', 'format', 'language',
                           'tokens', 'source']
    assert trace['source'] | {'step': 0, 'seed': 0, 'temperature': 1.0, 'template': 'short'} == trace['source']
  assert len({(trace['question'], trace['response']) for trace in traces}) == len(traces)


def test_sampling_killed_in_mid_line_goes_on_to_the_same_bytes(sampled, tmp_path):
  path, whole = tmp_path / 'run', (sampled / 'answers.jsonl').read_bytes()
  shutil.copytree(sampled, path)
  for name in ('summary.json', 'traces.jsonl'):
    (path / name).unlink()
  (path / 'answers.jsonl').write_bytes(whole[:len(whole) * 2 // 3])
  runs.finish(runs.start('rejection.py', CHANGES, path))
  assert (path / 'answers.jsonl').read_bytes() == whole
  assert (path / 'traces.jsonl').read_bytes() == (sampled / 'traces.jsonl').read_bytes()
  timeless = [{k: v for k, v in runs.summary(p).items() if k not in ('seconds', 'costs')} for p in (path, sampled)]
  assert timeless[0] == timeless[1]


def test_a_workdir_whose_problems_have_changed_is_refused(sampled, tmp_path):
  path = tmp_path / 'run'
  shutil.copytree(sampled, path)
  (path / 'summary.json').unlink()
  lines = (path / 'answers.jsonl').read_text().splitlines(keepends=True)
  (path / 'answers.jsonl').write_text(''.join([json.dumps(json.loads(lines[0]) | {'id': 77}) + '\n', *lines[1:]]))
  done = runs.run_to_end(runs.start('rejection.py', CHANGES, path))
  assert done.returncode == 2 and 'problem 0, sample 0' in done.stderr and 'Use another workdir' in done.stderr
