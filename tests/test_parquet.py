"""Problems from Parquet files: the same problems as from JSON lines, and messages for what is none."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import runs

from moe_rl.data.problem_files import DataError
from moe_rl.data.problems import load_problems, scan_problems

LINES = runs.ROOT / 'tests' / 'data' / 'gsm8k_like.jsonl'


def write(path, rows: list[dict]):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  return path


def test_parquet_gives_the_problems_that_json_lines_give(tmp_path):
  rows = [json.loads(line) for line in LINES.read_text().splitlines() if line.strip()]
  assert load_problems(write(tmp_path / 'train.parquet', rows)) == load_problems(LINES)


def test_numbers_are_read_by_their_digits_and_a_bad_row_is_named(tmp_path):
  rows = [{'question': 'half?', 'answer': 0.5, 'kind': 'math'}, {'question': '', 'answer': 1.0, 'kind': 'math'}]
  scan = scan_problems(write(tmp_path / 'own.parquet', rows), 'jsonl')
  assert [p.reference for p in scan.problems] == ['0.5'] and [f.line for f in scan.faults] == [2]


def test_what_is_no_parquet_file_is_refused(tmp_path):
  path = tmp_path / 'cut.parquet'
  path.write_bytes(b'PAR1 and no more')
  with pytest.raises(DataError, match='cut.parquet: is no Parquet file .*downloaded to the end'):
    load_problems(path)
  with pytest.raises(DataError, match='holds no record'):
    load_problems(write(tmp_path / 'empty.parquet', [{'question': 'a', 'answer': 'b'}][:0]))
