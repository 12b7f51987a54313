"""Problem files: good ones load whole, and every bad line is told with its number, cause and remedy."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from moe_rl.data import problems
from moe_rl.data.problems import DataError, Problem, load_problems, scan_problems, usable_problems
from moe_rl.rl.rewards.extract import last_boxed
from moe_rl.rl.rewards.pool import RewardPool

SAMPLES = pathlib.Path(__file__).parent / 'data'
GSM8K = '{"question": "What is 2+3?", "answer": "2+3=5\\n#### 5"}'
MATH = '{"problem": "What is $2+3$?", "answer": "5"}'
COUNTDOWN = '{"input": "2,3", "output": "5"}'
OWN = '{"prompt": "What is 2+3?", "reference": "5"}'


def _write(folder, content, name='file.jsonl'):
  path = folder / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def _message(path, fmt='auto'):
  with pytest.raises(DataError) as caught:
    load_problems(path, fmt)
  return str(caught.value)


def _told(path):
  """What is said of a bad record: the refusal, or the note where only its gold answer is at fault."""
  try:
    return '\n'.join(usable_problems(path).notes)
  except DataError as refusal:
    return str(refusal)


# Good files.


def test_gsm8k_gold_is_what_follows_the_last_marker_without_thousands_commas():
  found = load_problems(SAMPLES / 'gsm8k_like.jsonl')
  assert [p.reference for p in found] == ['108', '12', '7700', '-7', '59']
  assert [p.id for p in found] == [0, 1, 2, 3, 4]
  assert {p.kind for p in found} == {'math'}
  assert found[4].question.startswith('Tickets cost €12')


def test_math_gold_is_the_answer_or_else_the_last_box_of_the_solution():
  found = load_problems(SAMPLES / 'math_like.jsonl')
  assert [p.reference for p in found] == ['\\frac{2}{5}', '3\\sqrt{5}', '(0, 2)', '\\frac{1}{18}', '8']
  assert {p.kind for p in found} == {'math'}


def test_countdown_question_names_numbers_and_target_in_one_line():
  found = load_problems(SAMPLES / 'countdown.jsonl')
  question = 'Use 3,8,11 once each with + - * / to make 35.'
  assert found[0] == Problem(0, question, '{"numbers":[3,8,11],"target":35}', 'countdown')
  assert json.loads(found[3].reference) == {'numbers': [25, 3, 5, 2], 'target': 38}


def test_a_csv_of_puzzles_is_the_24_game(tmp_path):
  path = _write(tmp_path, 'Rank,Puzzles,"Time (s)"\r\n1,1 1 4 6,4.4\r\n\r\n2,5 6 9 10,8.28\r\n', 'game.csv')
  found = load_problems(path)
  assert [p.id for p in found] == [0, 1]
  assert found[1].question == 'Use 5,6,9,10 once each with + - * / to make 24.'
  assert found[1].reference == '{"numbers":[5,6,9,10],"target":24}'


@pytest.mark.parametrize('question', ['question', 'prompt', 'problem'])
@pytest.mark.parametrize('answer', ['answer', 'reference'])
def test_own_data_may_name_its_fields_in_any_of_these_ways(tmp_path, question, answer):
  lines = [
    {question: 'One?', answer: '1'},
    {question: 'Half?', answer: '\\frac{1}{2}'},
    {question: 'A thousand?', answer: '1,000', 'kind': 'integer'},
    {question: 'One as mathematics?', answer: '1', 'kind': 'math'},
  ]
  found = load_problems(_write(tmp_path, '\n'.join(map(json.dumps, lines))), 'jsonl')
  assert [p.reference for p in found] == ['1', '\\frac{1}{2}', '1000', '1']
  assert [p.kind for p in found] == ['math', 'math', 'integer', 'math']


@pytest.mark.parametrize('name', ['gsm8k_like.jsonl', 'math_like.jsonl', 'countdown.jsonl'])
def test_problems_written_as_own_data_load_as_the_same_problems(tmp_path, name):
  first = load_problems(SAMPLES / name)
  path = _write(tmp_path, '\n'.join(json.dumps(dataclasses.asdict(problem)) for problem in first))
  assert load_problems(path) == first


EACH = [(GSM8K, 'gsm8k'), (MATH, 'math'), (COUNTDOWN, 'countdown'), (OWN, 'jsonl')]


@pytest.mark.parametrize(('line', 'fmt'), EACH)
def test_the_format_is_told_from_the_fields_and_naming_it_changes_nothing(tmp_path, line, fmt):
  path = _write(tmp_path, line)
  assert scan_problems(path).format == fmt
  assert scan_problems(path) == scan_problems(path, fmt)


def test_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline_change_no_problem(tmp_path):
  plain = load_problems(SAMPLES / 'gsm8k_like.jsonl')
  lines = (SAMPLES / 'gsm8k_like.jsonl').read_bytes().splitlines()
  disguised = b'\xef\xbb\xbf' + b'\r\n\r\n  \r\n'.join(lines)
  assert load_problems(_write(tmp_path, disguised)) == plain
  assert load_problems(_write(tmp_path, disguised + b'\r\n\n\n')) == plain


def test_one_array_holds_the_same_problems_as_lines_do(tmp_path):
  plain = load_problems(SAMPLES / 'math_like.jsonl')
  records = [json.loads(line) for line in (SAMPLES / 'math_like.jsonl').read_text().splitlines()]
  for indent in (None, 2):
    path = _write(tmp_path, json.dumps(records, indent=indent), 'file.json')
    assert load_problems(path) == plain


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
  path = _write(tmp_path, '{"question": "a\u2028b", "answer": "1"}\n{"question": "c\x85d", "answer": "2"}')
  assert [p.question for p in load_problems(path)] == ['a\u2028b', 'c\x85d']


@pytest.mark.parametrize(
  ('literal', 'text'),
  [
    ('27.0', '27'),
    ('-0.0', '0'),
    ('2.50', '2.5'),
    ('1e3', '1000'),
    ('0.1234567890123456789', '0.1234567890123456789'),  # a float keeps 17 digits
    ('12345678901234567890123', '12345678901234567890123'),
  ],
)
def test_numbers_become_text_without_losing_a_digit(tmp_path, literal, text):
  path = _write(tmp_path, f'{{"problem": "?", "answer": {literal}}}')
  assert load_problems(path)[0].reference == text


@pytest.mark.parametrize(
  ('text', 'content'),
  [
    ('\\boxed{1} then \\boxed{2}', '2'),
    ('\\boxed{\\frac{1}{2}}', '\\frac{1}{2}'),
    ('$\\boxed{\\{1, 2\\}}$', '\\{1, 2\\}'),
    ('\\boxed{\\left\\{ 1 \\right.}', '\\left\\{ 1 \\right.'),
    ('\\boxed {7}', '7'),
    ('\\boxed{1', None),
    ('\\boxed{1} then \\boxed{2', None),  # cut off: the earlier box is not the answer
    ('no box', None),
  ],
)
def test_last_boxed_balances_braces(text, content):
  assert last_boxed(text) == content


def test_ids_stay_when_a_bad_record_is_mended(tmp_path):
  scan = scan_problems(_write(tmp_path, f'{MATH}\n{{}}\n\n{MATH}'), 'math')
  assert [p.id for p in scan.problems] == [0, 2]
  assert [fault.line for fault in scan.faults] == [2]


# Bad files: the whole file.


def test_a_missing_file_names_the_nearest_one(tmp_path):
  _write(tmp_path, GSM8K, 'train.jsonl')
  message = _message(tmp_path / 'trian.jsonl')
  assert str(tmp_path / 'trian.jsonl') in message
  assert "no such file (nearest: 'train.jsonl')" in message
  assert f'(nor a directory {tmp_path / "nowhere"})' in _message(tmp_path / 'nowhere' / 'train.jsonl')


def test_a_directory_names_the_files_in_it(tmp_path):
  assert 'it holds no .jsonl' in _message(tmp_path)
  _write(tmp_path, GSM8K, 'train.jsonl')
  message = _message(tmp_path)
  assert str(tmp_path) in message
  assert 'is a directory' in message
  assert 'train.jsonl' in message


@pytest.mark.parametrize(
  ('content', 'name', 'why'),
  [
    (b'', 'a.jsonl', 'empty (0 bytes)'),
    (b'\n \r\n', 'a.jsonl', 'holds no record'),
    (b'\xef\xbb\xbf', 'a.jsonl', 'holds no record'),
    (b'[]', 'a.json', 'holds no record'),
    (b'Rank,Puzzles\n', 'a.csv', 'holds no record'),
    (GSM8K.encode('utf-16'), 'a.jsonl', 'UTF-16: save it as UTF-8'),
  ],
)
def test_a_file_with_nothing_to_read_is_refused(tmp_path, content, name, why):
  path = _write(tmp_path, content, name)
  assert _message(path).startswith(f'{path}: ')
  assert why in _message(path)


def test_an_unknown_format_and_one_that_does_not_fit_the_file_are_refused(tmp_path):
  assert "'gsm8' is unknown (nearest: 'gsm8k')" in _message('any.jsonl', 'gsm8')
  path = _write(tmp_path, 'Rank,Puzzles\n1,1 1 4 6\n', 'game.csv')
  assert f"{path}:2: field 'question' is missing" in _message(path, 'gsm8k')


def test_a_table_is_read_by_the_names_in_its_head(tmp_path):
  problem, = load_problems(_write(tmp_path, 'question,answer\n"1, and 1?","1,080"\n', 'own.csv'))
  assert (problem.question, problem.reference, problem.kind) == ('1, and 1?', '1080', 'math')


@pytest.mark.parametrize(
  ('content', 'name', 'seen'),
  [
    ('\n{"id": 1, "final": ["2"]}', 'a.jsonl', [':2: ', "'.jsonl'", "the fields 'id', 'final'"]),
    ('Rank,Puzzle\n1,1 1 4 6', 'a.csv', [':2: ', "'.csv'", "the fields 'Rank', 'Puzzle'"]),
    ('[3]', 'a.json', [':1: is a number, not a JSON object']),
    ('what?', 'a.txt', [':1: is not valid JSON', 'column 1']),
  ],
)
def test_a_format_that_cannot_be_told_says_what_was_seen(tmp_path, content, name, seen):
  path = _write(tmp_path, content, name)
  message = _message(path)
  assert str(path) in message
  assert [words for words in seen if words not in message] == []


# Bad files: one line of them. The bad line is the third, after a good one and a blank one.

BAD_LINES = [
  (GSM8K, '{"question": "?", "answer": "1"', "is not valid JSON (Expecting ',' delimiter, column 32)"),
  (GSM8K, '["?", "1"]', 'is an array, not a JSON object'),
  (GSM8K, 'null', 'is null, not a JSON object'),
  (GSM8K, '{"question": "?"}', "field 'answer' is missing (the record has 'question')"),
  (GSM8K, '{}', "field 'question' is missing (the record has no field)"),
  (GSM8K, '{"question": " ", "answer": "#### 1"}', "field 'question' is empty"),
  (GSM8K, '{"question": null, "answer": "#### 1"}', "field 'question' is null: fill it in"),
  (GSM8K, '{"question": true, "answer": "#### 1"}', "field 'question' is a boolean, not text"),
  (GSM8K, '{"question": {"a": 1}, "answer": "#### 1"}', "field 'question' is an object, not text"),
  (GSM8K, '{"question": "\\ud83d", "answer": "#### 1"}', "field 'question' holds \\ud83d, half a character"),
  (GSM8K, '{"question": "?", "answer": "so it is 5"}', "field 'answer' ('so it is 5') has no '####'"),
  (GSM8K, '{"question": "?", "answer": "5 #### "}', "field 'answer' has nothing after its last '####'"),
  (GSM8K, '{"question": "?", "answer": "#### five"}', "reference 'five' is not one number"),
  (GSM8K, '{"question": "?", "answer": "#### 12,34"}', "reference '12,34' is not one number"),
  (MATH, '{"problem": "?", "answer": ["5"]}', "field 'answer' is an array, not text"),
  (MATH, '{"problem": "?", "answer": ""}', "field 'answer' is empty"),
  (MATH, '{"problem": "?", "answer": null}', "field 'answer' is null: fill it in"),
  (MATH, '{"problem": "?", "answer": NaN}', "field 'answer' is 'NaN', no number"),
  (MATH, '{"problem": "?", "answer": 1e999}', "field 'answer' is '1e999', no number"),
  (MATH, '{"problem": "?", "answer": ' + '9' * 5000 + '}', 'cannot be read as JSON (Exceeds the limit'),
  (MATH, '{"problem": "?", "solution": "\\\\boxed{5"}', "'solution' has no last \\boxed{...}"),
  (MATH, '{"problem": "?", "solution": "\\\\boxed{ }"}', "'solution' has no last \\boxed{...}"),
  (MATH, '{"problem": "?", "answer": "' + 'a' * 501 + '"}', 'has 501 characters, over the limit of 500'),
  (MATH, '{"problem": "?", "answer": "' + '(' * 9 + '"}', 'has 9 nested brackets, over the limit of 8'),
  (MATH, '{"problem": "?", "answer": "' + '|x' * 13 + '"}', 'has 13 bars |, over the limit of 12'),
  (COUNTDOWN, '{"input": "2;3", "output": "5"}', "field 'input' holds '2;3' where an integer"),
  (COUNTDOWN, '{"input": "2,3", "output": "5.5"}', "field 'output' holds '5.5' where an integer"),
  (COUNTDOWN, '{"input": "2,,3", "output": "5"}', "field 'input' holds '' where an integer"),
  (COUNTDOWN, '{"input": "5", "output": "5"}', 'there is only the number 5 to make 5 of'),
  (OWN, '{"prompt": "?", "answer": "5", "kind": "intger"}', "no accuracy function (nearest: 'integer')"),
  (OWN, '{"prompt": "?", "answer": "#### 5"}', "holds '####', as in GSM8K: name the format gsm8k"),
  (OWN, '{"prompt": "?", "final": "5"}', "field 'answer' is missing (the record has 'prompt', 'final')"),
]


@pytest.mark.parametrize(('good', 'bad', 'why'), BAD_LINES)
def test_a_bad_line_is_told_with_its_number_and_cause(tmp_path, good, bad, why):
  path = _write(tmp_path, f'{good}\n\n{bad}\n{good}\n')
  told = _told(path)
  assert any(head in told for head in (f'{path}: 1 of 3 records cannot be used', f'left out 1 of 3 problems of {path}'))
  assert why in told.split(f'  {path}:3: ')[1]


def test_a_line_that_is_not_utf8_is_told_with_its_byte(tmp_path):
  path = _write(tmp_path, GSM8K.encode() + b'\n{"question": "caf\xe9?", "answer": "#### 1"}\n')
  assert f'{path}:2: is not UTF-8 (0xe9 at byte 18): save file.jsonl as UTF-8' in _message(path)


def test_deep_nesting_is_a_bad_line_not_a_crash(tmp_path):
  path = _write(tmp_path, f'{GSM8K}\n{{"question": {"[" * 200_000}')
  assert f'{path}:2: cannot be read as JSON (' in _message(path)


def test_a_short_row_of_csv_is_told_with_its_line(tmp_path):
  path = _write(tmp_path, 'Rank,Puzzles\n1,1 1 4 6\n2\n3,1 1 x 6\n', 'game.csv')
  message = _message(path)
  assert f"{path}:3: field 'Puzzles' is missing (the record has 'Rank')" in message
  assert f"{path}:4: field 'Puzzles' holds 'x' where an integer is wanted" in message


def test_a_bad_element_of_an_array_is_told_with_the_line_on_which_it_begins(tmp_path):
  path = _write(tmp_path, f'[\n  {MATH},\n  {{\n    "problem": "?",\n    "answer": ""\n  }}\n]\n', 'a.json')
  assert f"{path}:3: field 'answer' is empty" in _told(path)


@pytest.mark.parametrize(
  ('text', 'why'),
  [
    (f'[\n{MATH}\n{MATH}]', ":3: is not valid JSON (Expecting ',' or ']', column 1)"),
    (f'[\n{MATH},\n]', ':3: is not valid JSON (Expecting value, column 1)'),
    (f'[\n{MATH},\n', ':3: is not valid JSON (Expecting value, column 1)'),
    (f'[\n{MATH}', ":2: is not valid JSON (Expecting ',' or ']', column"),
    (f'[{MATH}]\n[{MATH}]', ':2: stands after the end of the array'),
  ],
)
def test_a_broken_array_is_told_with_the_line_where_it_breaks(tmp_path, text, why):
  path = _write(tmp_path, text, 'a.json')
  assert f'{path}{why}' in _message(path)


def test_one_object_over_many_lines_is_one_fault(tmp_path):
  path = _write(tmp_path, json.dumps({'data': [], 'version': 1}, indent=2), 'a.json')
  message = _message(path)
  assert f"{path}:1: the file is a single JSON object with the fields 'data', 'version'" in message
  assert ':2:' not in message


def test_five_bad_lines_are_quoted_and_all_are_counted(tmp_path):
  path = _write(tmp_path, '\n'.join([GSM8K] * 3 + ['{}'] * 8))
  message = _message(path)
  assert f'{path}: 8 of 11 records cannot be used (read as gsm8k)' in message
  assert [f'{path}:{line}: ' in message for line in range(4, 12)] == [True] * 5 + [False] * 3
  assert 'and 3 more' in message
  assert f'python -m moe_rl.data.problems {path}' in message


# Gold answers that are absent or cannot be read.


def test_a_problem_whose_gold_answer_is_absent_or_unreadable_is_left_out_counted_and_named(tmp_path, caplog):
  lines = [MATH, '{"problem": "?", "answer": null}', '{"problem": "?", "answer": "..."}', MATH, '{"problem": "?"}']
  path = _write(tmp_path, '\n'.join(lines))
  usable = usable_problems(path)
  assert [p.id for p in usable.problems] == [0, 3] and usable.left_out == 3
  assert 'left out 3 of 5 problems' in usable.notes[0]
  for line, why, note in zip((2, 3, 5), ('is null', "'...' is neither", 'is missing'), usable.notes[1:], strict=True):
    assert f'{path}:{line}: ' in note and why in note
  assert load_problems(path) == usable.problems and caplog.messages == ['\n'.join(usable.notes)]


def test_a_bad_record_refuses_a_training_file_all_the_same_and_so_does_one_with_no_problem_left(tmp_path):
  for lines in ([MATH, '{"problem": "?", "answer": null}', '{"problem": '], ['{"problem": "?", "answer": ""}']):
    with pytest.raises(DataError, match='cannot be used'):
      usable_problems(_write(tmp_path, '\n'.join(lines)), 'math')


def test_a_reference_that_takes_forever_to_read_costs_its_limit_and_is_named():
  with RewardPool(workers=2, timeout_s=1.0) as graders:
    why = graders.check([('math', 'x^2'), ('math', '(' * 2000 + 'x' + ')' * 2000), ('math', '18'), ('integer', 'x')])
  assert (why[0], why[2]) == (None, None)
  assert 'takes over 1 s to read' in why[1]
  assert 'not one whole number' in why[3]


# The command line.


def _command(*args):
  command = [sys.executable, '-m', 'moe_rl.data.problems', *map(str, args)]
  return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=SAMPLES.parents[1])


def test_the_command_prints_count_format_and_three_examples():
  done = _command(SAMPLES / 'gsm8k_like.jsonl')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'format gsm8k, 5 problems, 0 bad records (math: 5)' in done.stdout
  assert [f'\n[{index}] ' in done.stdout for index in range(4)] == [True, True, True, False]


def test_the_command_lists_every_bad_line_and_fails(tmp_path, capsys):
  path = _write(tmp_path, '\n'.join([GSM8K] + ['{}'] * 8))
  assert problems.main([str(path), '--format=gsm8k']) == 1
  printed = capsys.readouterr().out
  assert all(f'{path}:{line}: field' in printed for line in range(2, 10))
  assert problems.main([str(tmp_path / 'missing.jsonl')]) == 1
  assert 'no such file' in capsys.readouterr().err


# The public files, where they lie beside the repository; counts as in their README.


@pytest.mark.data
@pytest.mark.parametrize(
  ('name', 'fmt', 'count'),
  [
    ('gsm8k/train.jsonl', 'gsm8k', 7473),
    ('gsm8k/test.jsonl', 'gsm8k', 1319),
    ('math/math500_test.jsonl', 'math', 500),
    ('math_eval/aime24.jsonl', 'math', 30),
    ('math_eval/amc23.jsonl', 'math', 40),
    ('countdown/countdown_cd3_test.jsonl', 'countdown', 256),
    ('countdown/game24_4nums.csv', 'countdown', 1362),
  ],
)
def test_public_files_load_whole(shared_data, name, fmt, count):
  scan = scan_problems(shared_data / name)
  assert (scan.format, len(scan.problems), scan.faults) == (fmt, count, ())
  assert [p.id for p in scan.problems] == list(range(count))


@pytest.mark.slow
@pytest.mark.data
def test_math_train_loads_but_for_four_problems_without_a_gold_answer_which_are_named(shared_data):
  """It was published so: they must be told, neither dropped in silence nor given an answer."""
  path = shared_data / 'math' / 'math_train_7474.json'
  usable = usable_problems(path)
  assert (len(usable.problems), usable.left_out) == (7470, 4)
  assert {886, 1009, 5328, 5330} == set(range(7474)) - {p.id for p in usable.problems}
  assert 'left out 4 of 7474' in usable.notes[0]
  assert [f'  {path}:{line}: ' in note for line, note in zip((5318, 6056, 31970, 31982), usable.notes[1:], strict=True)]


@pytest.mark.data
def test_boxed_answers_of_math500_are_its_answers(shared_data):
  """The file's own answers were cut from the boxes of its solutions, so ours must be the same text."""
  lines = (shared_data / 'math' / 'math500_test.jsonl').read_text().split('\n')
  records = [json.loads(line) for line in lines if line]
  differ = [r['unique_id'] for r in records if last_boxed(r['solution']) != r['answer'].strip()]
  assert differ == []


@pytest.mark.data
def test_files_of_other_kinds_are_refused_with_their_fields(shared_data):
  sentences = _message(shared_data / 'langid' / 'sentences.jsonl')
  assert ':1: the format cannot be told' in sentences
  assert "'lang'" in sentences


@pytest.mark.data
def test_olympiadbench_is_read_as_mathematics(shared_data):
  scan = scan_problems(shared_data / 'math_eval' / 'olympiadbench_oe_to_maths_en.jsonl')
  assert (scan.format, len(scan.problems)) == ('math', 673) and [fault.line for fault in scan.faults] == [97, 195]


@pytest.mark.data
def test_gsm8k_loads_without_jax_and_without_computer_algebra(shared_data):
  code = (
    'import sys, time; from moe_rl.data.problems import load_problems; load_problems(sys.argv[1]);'
    'print(time.process_time());'  # CPU seconds of the whole process: other work on the machine does not count
    'print(sorted({"jax", "math_verify", "sympy"} & set(sys.modules)))'
  )
  command = [sys.executable, '-c', code, str(shared_data / 'gsm8k' / 'train.jsonl')]
  done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SAMPLES.parents[1])
  seconds, imported = done.stdout.split('\n')[:2]
  assert imported == '[]'
  assert float(seconds) < 2  # 0.15 measured
