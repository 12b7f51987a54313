"""A list of stages: what one makes the next one takes, a stop anywhere changes nothing, and bad lists are refused."""

import json
import signal

import pytest
import runs

from moe_rl import config as configs
from moe_rl.main import load_experiment
from moe_rl.stages import pipeline

SMALL = str(runs.ROOT / 'tests' / 'data' / 'small_pipeline.py')


def start(workdir):
  base = str(runs.pretrained()[0] / 'base.safetensors')
  sampled = {'model': runs.MODEL, 'task': runs.TASK, 'sampling': runs.RL['sampling']}
  zero = runs.RL | {'init_from': base, 'rl': runs.RL['rl'] | {'steps': 4}, 'checkpoint': {'every': 1}}
  changes = {'given': {'base': base}, 'evaluation': sampled | {'eval': dict(problems=8, samples=2)}, 'stages': {
    'zero': zero, 'traces': sampled | {'sample': dict(samples=4)},
    'tuned': {'model': runs.MODEL, 'sft': dict(rows_per_step=4, row_tokens=48, microbatch_rows=4)}}}
  return runs.start('../tests/data/small_pipeline.py', changes, workdir)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(workdir, printed text) of an uninterrupted list."""
  path = tmp_path_factory.mktemp('pipeline') / 'whole'
  return path, runs.finish(start(path)).stdout


def evaluated(summary: dict) -> dict:
  """The rows without their clocks."""
  rows = summary['rows'].items()
  return {name: {k: v for k, v in row.items() if k not in ('seconds', 'costs')} for name, row in rows}


def test_each_stage_takes_what_an_earlier_one_made(whole):
  path, _ = whole
  summary = runs.summary(path)
  assert summary['complete'] and list(summary['rows']) == ['base', 'zero', 'tuned']
  assert list(summary['stages']) == ['zero', 'traces', 'tuned']
  assert json.loads((path / 'traces' / 'config.json').read_text())['init_from'] == str(path / 'zero')
  kept = summary['stages']['traces']['kept']
  assert kept > 0 and summary['stages']['tuned']['examples'] == kept  # 60 steps of pre-training make a quarter right
  assert len((path / 'traces' / 'traces.jsonl').read_text().splitlines()) == kept
  assert summary['rows']['zero']['step'] == 8 or summary['rows']['zero']['step'] == 4  # updates or rollouts, not 0


def test_the_table_has_a_line_a_row(whole):
  path, text = whole
  lines = (path / 'table.md').read_text().splitlines()
  rows = runs.summary(path)['rows']
  assert [line.split('|')[1].strip() for line in lines[2:]] == list(rows)
  for line, row in zip(lines[2:], rows.values(), strict=True):
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    assert cells[1] == f'{row["pass@1"]:.3f}' and cells[4] == f'{row["language"]:.3f}'
  assert lines[2] in text


def test_stopped_in_a_stage_it_ends_as_if_it_had_not_been(whole, tmp_path):
  path = tmp_path / 'stopped'
  process = start(path)
  runs.wait_until(lambda: runs.checkpoints(path / 'zero'), process)
  process.send_signal(signal.SIGTERM)
  runs.finish(process)
  assert not runs.summary(path)['complete'] and not (path / 'traces').exists()
  runs.finish(start(path))
  assert evaluated(runs.summary(path)) == evaluated(runs.summary(whole[0]))
  assert runs.metrics(path / 'tuned') == runs.metrics(whole[0] / 'tuned')


def test_a_finished_list_does_nothing_again(whole):
  path, _ = whole
  before = {p: p.stat().st_mtime_ns for p in path.rglob('*.jsonl')}
  summary = runs.summary(path)
  runs.finish(start(path))
  assert {p: p.stat().st_mtime_ns for p in path.rglob('*.jsonl')} == before
  assert evaluated(runs.summary(path)) == evaluated(summary)


def small():
  return load_experiment(SMALL)


def test_bad_lists_are_refused_with_the_stage_named(tmp_path):
  config = small()
  config.order = ('zero', 'tune')
  words = "config.order names 'tune', which config.stages has not: it has traces, tuned, zero"
  with pytest.raises(ValueError, match=words):
    pipeline.validate(config, 1, 384)
  config = small()
  config.rows = ('final',)
  with pytest.raises(ValueError, match="config.rows names 'final', which is not in config.order"):
    pipeline.validate(config, 1, 384)
  config = small()
  config.stages.traces.sample.keep = 'some'
  with pytest.raises(ValueError, match="traces: config.sample.keep 'some': use one of all, one, shortest, longest"):
    pipeline.validate(config, 1, 384)
  pipeline.claim(tmp_path, small())
  config = small()
  config.order = ('zero',)
  with pytest.raises(ValueError, match='belongs to another list of stages'):
    pipeline.claim(tmp_path, config)


def test_a_name_in_braces_is_a_folder_and_the_seed_is_shared(tmp_path):
  config = small()
  config.seed = 7
  section = pipeline.resolved(config.stages.tuned, tmp_path, config.order)
  assert section.sft.path == f'{tmp_path}/traces/traces.jsonl' and section.init_from == f'{tmp_path}/zero'
  assert section.seed == 7 and config.stages.tuned.init_from == '{zero}'
  section.template = 'r1_zero {prompt}'
  assert pipeline.resolved(section, tmp_path, config.order).template == 'r1_zero {prompt}'  # no stage of that name


def test_the_shipped_lists_are_valid():
  for name in ('r1', 'distill_vs_rl'):
    config = load_experiment(str(runs.ROOT / 'experiments' / f'{name}.py'))
    derived = pipeline.validate(config, 1, configs.base_config().model.vocab_size)
    assert all(row in derived['rows'] for row in config.rows)
