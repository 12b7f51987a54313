"""Training questions that are evaluation questions are found by their words, and left out."""

import json

import pytest

from moe_rl.config import base_config
from moe_rl.data import decontaminate
from moe_rl.data.decontaminate import Overlaps, Place, words
from moe_rl.data.prompts import load_prompts
from moe_rl.data.tokenizer import load_tokenizer

LONG = 'A train leaves the station at noon and travels east at sixty miles per hour. How far is it after two hours?'
HERE = Place('eval.jsonl', 3)


def test_words_are_the_same_whatever_case_space_and_punctuation_but_signs_of_arithmetic_count():
  assert words('  Don’t   PANIC,\n“Sir”! ') == words('don’t panic sir') != words('don’t panic')
  assert words('２＋３') == words('2 + 3') == ('2', '+', '3') != words('2-3') == ('2', '-', '3')
  assert words('well-known (n-gram)') == ('well', 'known', 'n', 'gram')
  assert words('求 $x^2$ 的值') == ('求', 'x', '^', '2', '的', '值')


def overlap(training: str, evaluation: str, n=10) -> bool:
  found = Overlaps(n)
  found.add(evaluation, HERE)
  assert found.of(training) in ((), (HERE,))
  return bool(found.of(training))


def test_ten_words_in_a_row_are_an_overlap_and_nine_are_none():
  said = LONG.split()
  assert overlap('Well, ' + ' '.join(said[4:14]).upper() + ' …?', LONG)
  assert not overlap('Well, ' + ' '.join(said[4:13]), LONG)
  assert overlap('Well, ' + ' '.join(said[4:13]), LONG, n=9)


def test_a_short_question_overlaps_with_its_equals_only():
  assert overlap('what is 2+3 ?', 'What is 2 + 3?') and not overlap('What is 2-3?', 'What is 2+3?')
  assert not overlap('What is 2+3+4?', 'What is 2+3?') and not overlap(LONG + ' What is 2+3?', 'What is 2+3?')
  assert not overlap('?', '!')  # nothing is said


@pytest.fixture
def files(tmp_path):
  """(training lines, their file, evaluation file): lines 2 and 4 of six overlap."""
  lines = [json.dumps({'question': q, 'answer': '1'}) for q in (
    'one?', 'Suppose that ' + LONG, 'two?', '8+1 = ?', '8-1=?', 'Zwei und zwei?')]
  train, evaluation = tmp_path / 'train.jsonl', tmp_path / 'eval.jsonl'
  train.write_text('\r\n\n'.join(lines) + '\n')
  evaluation.write_text(json.dumps([{'problem': LONG, 'answer': '120'}, {'problem': '8+1=?', 'answer': '9'}], indent=1))
  return lines, train, evaluation


def test_the_command_names_pairs_and_writes_the_rest_byte_for_byte(files, tmp_path, capsys):
  lines, train, evaluation = files
  arguments = [str(train), '--against', str(evaluation)]
  assert decontaminate.main(arguments) == 1
  printed = capsys.readouterr().out.splitlines()
  assert printed[:2] == [f'{train}:3: {evaluation}:2', f'{train}:7: {evaluation}:6']
  assert printed[2].startswith(f'2 of 6 questions of {train} have 10 words in a row')
  assert decontaminate.main([*arguments, f'--out={tmp_path / "kept.jsonl"}']) == 0
  kept = (tmp_path / 'kept.jsonl').read_bytes().decode()
  assert [line.strip() for line in kept.split('\n') if line.strip()] == [lines[i] for i in (0, 2, 4, 5)]
  assert decontaminate.main([str(tmp_path / 'kept.jsonl'), '--against', str(evaluation)]) == 0
  assert decontaminate.main([str(tmp_path / 'kept.jsonl'), '--against', str(evaluation), '--n=0']) == 2
  assert decontaminate.main([str(evaluation), '--against', str(train), f'--out={tmp_path / "x"}']) == 2
  assert 'is not one record a line' in capsys.readouterr().err


def test_the_config_key_leaves_overlapping_problems_out_counted_and_named(files):
  _, train, evaluation = files
  config = base_config('tiny')
  config.task.update({'name': 'jsonl', 'path': str(train), 'decontaminate': str(evaluation)})
  config.eval.problems, config.sampling.max_prompt_tokens, config.model.max_length = 1, 200, 400
  prompts = load_prompts(config, load_tokenizer('tiny'))
  assert [prompts.train[i].problem.id for i in range(len(prompts.train))] == [0, 2, 4]
  assert prompts.left_out == 2 and [p.problem.id for p in prompts.held_out] == [5]
  assert 'left out 2 training problems that have 10 words in a row' in prompts.notes[1]
  assert prompts.notes[2:] == [f'  problem 1 with {evaluation}:2', f'  problem 3 with {evaluation}:6']
  config.task.decontaminate = f'{evaluation}, {train}'
  with pytest.raises(ValueError, match='every problem overlaps with config.task.decontaminate'):
    load_prompts(config, load_tokenizer('tiny'))
