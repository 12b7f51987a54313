"""`python -m moe_rl.grade`: a file of predictions is graded as in training, and what cannot be is named."""

import json
import pathlib
import subprocess
import sys

import pytest

from moe_rl import config, grade
from moe_rl.rl.rewards import functions, pool

ROOT = pathlib.Path(__file__).parents[1]
LINES = [
    ({'prediction': 'The answer is \\boxed{18}.', 'reference': '18', 'id': 'a'}, 'correct'),
    ({'prediction': '<think>a</think> <answer>17</answer>', 'reference': 17}, 'correct'),
    ({'prediction': 'In the end that makes 0.5 of all', 'reference': '\\frac{1}{2}'}, 'correct'),
    ({'prediction': 17.0, 'reference': 17}, 'correct'),
    ({'prediction': '19', 'reference': '18'}, 'wrong'),
    ({'prediction': '<think>never ends 18', 'reference': '18'}, 'unparsable_answer'),
    ({'prediction': None, 'reference': '18'}, 'unparsable_answer'),
    ({'prediction': '1\x00\ud800', 'reference': ['1', '2']}, 'unparsable_answer'),
    ({'prediction': '18', 'reference': ''}, 'unparsable_reference'),
    ({'prediction': '9^{9^{9^{9}}}', 'reference': '18'}, 'timeout'),
]


def write(path: pathlib.Path, *lines: str) -> str:
  path.write_text('\n'.join(lines))
  return str(path)


def test_the_command_grades_each_line_keeps_the_order_and_names_the_bad_ones(tmp_path):
  lines = [json.dumps(fields) for fields, _ in LINES]
  file = write(tmp_path / 'in.jsonl', *lines[:4], '{"prediction": "1"}', *lines[4:], '{"prediction": "1",', '[3]')
  out = tmp_path / 'out.jsonl'
  done = subprocess.run([sys.executable, '-m', 'moe_rl.grade', file, '--reward=math', f'--out={out}', '--timeout_s=3'],
                        capture_output=True, text=True, cwd=ROOT, timeout=120)  # fmt: skip
  written = [json.loads(line) for line in out.read_text().splitlines()]
  assert [line['verdict'] for line in written] == [verdict for _, verdict in LINES]
  assert [line['reward'] for line in written] == [float(verdict == 'correct') for _, verdict in LINES]
  for line, (fields, _) in zip(written, LINES, strict=True):
    assert {key: line[key] for key in fields} == fields
  assert written[-1]['seconds'] >= 3 and all(line['seconds'] < 3 for line in written[:-1])
  assert done.returncode == 1
  for line, why in ((5, "field 'reference' is missing"), (12, 'is not valid JSON'), (13, 'is an array, not a JSON')):
    assert f'{file}:{line}: {why}' in done.stderr
  assert '10 lines graded as math' in done.stdout
  assert 'correct                     4   40.00%' in done.stdout
  assert 'over the 9 lines whose reference can be read' in done.stdout
  assert '0.4444' in done.stdout and 'Traceback' not in done.stderr


def test_limits_are_those_of_training_unless_told_otherwise():
  r = config.base_config().rewards
  assert (r.workers, r.timeout_s, r.memory_mb) == (pool.WORKERS, pool.TIMEOUT_S, pool.MEMORY_MB)


@pytest.mark.parametrize('arguments, why', [
    (['--reward=maths'], "'maths' (nearest: 'math')"), (['--reward=language:klingon'], "'klingon' is not known"),
    (['--workers=0'], 'at least 1 worker'),
    (['--timeout_s=0'], 'is no limit'),
])  # fmt: skip
def test_what_cannot_be_started_is_refused_with_the_remedy(tmp_path, capsys, arguments, why):
  file = write(tmp_path / 'a.jsonl', json.dumps(LINES[0][0]))
  assert grade.main([file, *arguments]) == 2
  assert why in capsys.readouterr().err
  assert grade.main([str(tmp_path / 'b.jsonl')]) == 2
  assert "nearest: 'a.jsonl'" in capsys.readouterr().err


def test_terms_of_text_grade_files_too(tmp_path, capsys):
  text = '<think>So we first add the two numbers and then look at what is left</think><answer>9</answer>'
  lines = [{'prediction': text, 'reference': 'en'}, {'prediction': text, 'reference': 'zh'},
           {'prediction': '先把两个数加在一起', 'reference': 'zh'}, {'prediction': text, 'reference': 'klingon'}]
  file, out = write(tmp_path / 'in.jsonl', *map(json.dumps, lines)), tmp_path / 'out.jsonl'
  for reward, scores in (('language', [1, 0, 1]), ('format', [1, 1, 0, 1]), ('repetition', [0] * 4),
                         ('language:en', [1, 1, 0, 1])):
    assert grade.main([file, f'--reward={reward}', f'--out={out}']) == (reward == 'language')
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line['reward'] for line in written] == scores
    assert {line['verdict'] for line in written} <= {'correct', 'wrong'}
  assert "language 'klingon' is not known" in capsys.readouterr().err


def test_where_the_tags_are_demanded_a_text_without_any_is_a_bare_answer(tmp_path):
  assert functions.as_response('integer', '18') == '<answer>18</answer>'
  for kind, text in (('integer', '<think>18'), ('integer', '</think>18'), ('math', '18')):
    assert functions.as_response(kind, text) == text
