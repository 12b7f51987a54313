"""Evaluation: its numbers against hand-made answers; the stage against RL, and interrupted, and on released weights."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import runs
from hub import TIED, write_hub

from moe_rl.data.templates import TAGS
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.main import launch
from moe_rl.models.config import own_fields
from moe_rl.models.hf_config import from_hf_config
from moe_rl.rl.rewards.pool import RewardPool
from moe_rl.rl.rewards.verdicts import CORRECT, UNPARSABLE_ANSWER, VERDICTS, WRONG
from moe_rl.rl.rewards.votes import Ballot, votes
from moe_rl.stages.evaluate import Evaluation, consensus, pass_at, table
from moe_rl.stages.sampling import thinking_tokens

TINY = load_tokenizer('tiny')
# Three batches of four problems, four samples each; answers at once fit into 24 tokens, long work does not.
CHANGES = {'eval': dict(problems=12, samples=4), 'sampling': dict(max_new_tokens=24, batch_samples=16),
           'rewards': dict(weights='accuracy=1,format=0.1,repetition=0.5,length=0.1')}


# The numbers.


def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_sample():
  for n in range(1, 7):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
      subsets = list(itertools.combinations(range(n), k))  # the samples 0 … correct - 1 are correct
      assert pass_at(k, n, correct) == pytest.approx(np.mean([min(s) < correct for s in subsets]), abs=1e-12)
  assert pass_at(64, 64, 1) == 1.0 and pass_at(1, 64, 16) == 0.25


def elect(kind, reference, answers, verdicts):
  with RewardPool(1) as pool:
    return votes(pool, [Ballot(kind, reference, answers, verdicts)])[0]


def test_equal_answers_are_one_vote():
  W, C, U = WRONG, CORRECT, UNPARSABLE_ANSWER
  halves = ['0.5', '3', '1/2', '\\frac{1}{2}', None, 'x+1', '1 + x', '$3$', '1+']
  assert elect('math', '7', halves, [W, W, W, W, U, W, W, W, U]) == [0, 1, 0, 0, None, 5, 5, 1, None]
  assert elect('math', '1/2', halves[:4], [C, W, C, C]) == [0, 1, 0, 0]
  assert elect('integer', '5', ['07', '7', '+7', '5', '1,000', '1000'], [W, W, W, C, W, W]) == [0, 0, 0, 3, 4, 4]
  choice = json.dumps({'answer': 'C', 'choices': ['4', '5', '6']})
  assert elect('choice', choice, ['(A)', '4', 'A) 4', 'C', 'B'], [W, W, W, C, W]) == [0, 0, 0, 3, 4]
  assert elect('exact', 'a b', ['a  c', 'a c', 'ac'], [W, W, W]) == [0, 0, 2]


def answer(problem, sample, accuracy, vote, verdict=None, **more) -> dict:
  return dict(id=problem, sample=sample, kind='math', level=str(problem), accuracy=float(accuracy), vote=vote,
              verdict=verdict or (CORRECT if accuracy else WRONG), format=1.0, language=1.0, tokens=10,
              thinking_tokens=4, stopped=True) | more


def test_most_votes_win_and_of_several_that_came_first():
  assert consensus([answer(0, 0, 0, 0), answer(0, 1, 1, 1), answer(0, 2, 1, 1)]) == 1.0
  assert consensus([answer(0, 0, 0, 0), answer(0, 1, 1, 1), answer(0, 2, 1, 1), answer(0, 3, 0, 0)]) == 0.0
  assert consensus([answer(0, 0, 0, None), answer(0, 1, 0, None), answer(0, 2, 1, 2)]) == 1.0
  assert consensus([answer(0, 0, 0, None)]) == 0.0


def test_a_record_is_right_by_hand():
  answers = [answer(1, 0, 1, 0), answer(1, 1, 1, 0), answer(1, 2, 0, 2), answer(1, 3, 0, None, UNPARSABLE_ANSWER),
             answer(2, 0, 0, 0, kind='choice'), answer(2, 1, 1, 1), answer(2, 2, 0, 0, tokens=30, stopped=False),
             answer(2, 3, 0, 3, format=0.0, language=0.2, thinking_tokens=12)]
  r = Evaluation(answers).record()
  assert (r['pass@1'], r['pass@1_se']) == (0.375, pytest.approx(0.125))  # 0.5 and 0.25
  assert r['pass@2'] == pytest.approx((5 / 6 + 1 / 2) / 2) and r['pass@4'] == 1.0 and r['cons@4'] == 0.5
  assert (r['mean_tokens'], r['thinking_tokens'], r['truncated']) == (12.5, 5.0, 0.125)
  assert r['format'] == 0.875 and r['language'] == pytest.approx(0.9)
  assert sum(r['verdicts'].values()) == 8 and set(r['verdicts']) == set(VERDICTS)
  assert r['verdicts'][UNPARSABLE_ANSWER] == 1
  assert {level: g['pass@1'] for level, g in r['by_level'].items()} == {'1': 0.5, '2': 0.25}
  assert {kind: g['problems'] for kind, g in r['by_kind'].items()} == {'math': 1, 'choice': 1}
  assert 'level 2' in table(r) and '0.375' in table(r)
  one = Evaluation([answer(0, 0, 1, 0, level='')]).record()
  assert math.isnan(one['pass@1_se']) and 'by_level' not in one and one['cons@1'] == 1.0


def test_thinking_is_counted_by_ids_and_else_by_its_text():
  def count(text, opening='', ids=None):
    ids = np.array(TINY.encode(text, allow=TAGS) if ids is None else ids)
    return thinking_tokens(TINY, ids, opening + text, opening)
  assert count('<think>1+2=3</think><answer>3</answer>') == 6  # <think> and five characters
  assert count('1+2=3</think><answer>3</answer>', opening='<think>') == 5
  assert count('<think>1+2') == 4 and count('1+2', opening='<think>\n') == 3 and count('<answer>3</answer>') == 0
  spelt = '<think>12</think>3'  # the end tag written out, a character a token
  ids = [*TINY.encode('<think>12', allow=TAGS), *(TINY.encode(c)[0] for c in '</think>3')]
  assert TINY.decode(ids) == spelt and count(spelt, ids=ids) == 3


# The stage.


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  """The workdir of an uninterrupted evaluation of the embedded base, in a process of its own."""
  path = tmp_path_factory.mktemp('evaluated') / 'run'
  runs.finish(runs.start('evaluate.py', CHANGES, path))
  return path


RL_AND_PROGRAM = """
import functools, json, sys
import jax
from moe_rl import config as configs
from moe_rl.data.prompts import load_prompts
from moe_rl.main import load_experiment
from moe_rl.rl.rewards.pool import RewardPool
from moe_rl.runtime import cores
from moe_rl.runtime.keys import key_for
from moe_rl.runtime.mesh import make_mesh
from moe_rl.stages.evaluate import Evaluate, evaluate
from moe_rl.stages.rl import RL
from moe_rl.stages.sampling import Judge, sample_prompts
cores.split(cores.candidates(128)[0])
seen, changes = [], json.loads(sys.argv[1])
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.rpartition('/')[2]))

def made(name, changes):
  config = load_experiment(f'experiments/{name}.py')
  config.update(changes)
  return configs.with_lengths(config, 20)
mesh = make_mesh(configs.mesh_sizes(made('evaluate', changes), jax.device_count()))
alone = Evaluate(made('evaluate', changes), mesh)
assert [program.function for program in alone.programs()] == [alone.sampler]
alone.programs()[0].lower().compile()
hits = (seen.count('cache_hits'), seen.count('cache_misses'))
changes['sampling'].pop('batch_samples')
config = made('r1_zero', changes)
config.rl.prompts_per_step = 6
stage = RL(config, mesh)
prompts = load_prompts(config, stage.tokenizer).held_out
sample = functools.partial(sample_prompts, stage.sample_eval, stage.initial_state(), stage.tokenizer, width=24,
                           key=key_for(0, 'eval', 0))
with RewardPool(2) as pool:
  found = evaluate(sample, Judge(pool, stage.tokenizer, 24), prompts, stage.eval_prompts)
print(json.dumps(dict(hits=hits, batch=stage.eval_prompts, record=found.record())))
"""


def test_the_stage_alone_gives_the_first_evaluation_of_rl_and_its_program_is_listed(evaluated):
  """RL samples twelve prompts at once here, the stage four. The stage's one program is found in the cache that its run
  has filled: what is listed is what runs."""
  found = json.loads(runs.finish(runs.start_python(RL_AND_PROGRAM, json.dumps(CHANGES))).stdout)
  alone = json.loads((evaluated / 'evaluation.json').read_text())
  assert found['batch'] == 12 and found['hits'] == [1, 0]
  assert found['record'] == {key: alone[key] for key in found['record']}
  assert 0 < alone['pass@1'] < 1 and 0 < alone['truncated'] < 1


def test_answers_have_all_that_the_record_is_made_of(evaluated):
  lines = runs.lines(evaluated / 'answers.jsonl')
  assert [(line['id'], line['sample']) for line in lines] == list(itertools.product(range(12), range(4)))
  record, summary = json.loads((evaluated / 'evaluation.json').read_text()), runs.summary(evaluated)
  again = Evaluation(lines).record()
  assert again == {key: record[key] for key in again} == {key: summary[key] for key in again}
  assert summary['complete'] and summary['answers'] == 48 == sum(record['verdicts'].values())
  assert summary['tokens'] == sum(line['tokens'] for line in lines)
  for line in lines:
    assert line['response'].startswith('<think>') or not line['format']
    assert (line['answer'] is None) <= (line['verdict'] != CORRECT) and line['tokens'] <= 24
    assert list(line['terms']) == ['accuracy', 'format', 'repetition', 'length']
    weighted = zip((1, 0.1, 0.5, 0.1), line['terms'].values(), strict=True)
    assert line['reward'] == pytest.approx(sum(w * v for w, v in weighted), abs=1e-6)  # summed in float32
    assert line['level'] == str(line['question'].count('+') + line['question'].count('-') + 1)
  assert record['template']['example'] == f'User:{lines[0]["question"]}Assistant:'
  assert record['sampling'] | {'samples': 4, 'max_new_tokens': 24, 'temperature': 1.0} == record['sampling']
  assert record['versions']['jax'] and record['checkpoint']['init_from'] == 'embedded'
  # The writer turns the @ of pass@1 into an underscore.
  assert runs.events(evaluated).Scalars('eval/pass_1')[0].value == pytest.approx(record['pass@1'])


def test_an_evaluation_killed_in_mid_line_goes_on_to_the_same_bytes(evaluated, tmp_path):
  path, whole = tmp_path / 'run', (evaluated / 'answers.jsonl').read_bytes()
  shutil.copytree(evaluated, path)
  for name in ('summary.json', 'evaluation.json'):
    (path / name).unlink()
  ends = [i for i, byte in enumerate(whole) if byte == ord('\n')]
  (path / 'answers.jsonl').write_bytes(whole[:ends[21] + 9])  # one batch, a part of the next, and a cut line
  printed = runs.finish(runs.start('evaluate.py', CHANGES, path))
  assert '1 of 3 batches were there' in printed.stdout + printed.stderr
  assert (path / 'answers.jsonl').read_bytes() == whole
  assert (path / 'evaluation.json').read_bytes() == (evaluated / 'evaluation.json').read_bytes()


def test_a_hugging_face_checkpoint_is_evaluated_on_a_whole_file(tmp_path):
  """A random Qwen2 of two layers: it says nothing right, and every one of its answers is counted."""
  folder, path = write_hub(tmp_path / 'hub', TIED, vocab_size=384), tmp_path / 'math.jsonl'
  path.write_text(''.join(json.dumps({'problem': f'{i}+1', 'answer': str(i + 1), 'level': f'Level {i % 2 + 1}'}) + '\n'
                          for i in range(5)))
  config = runs.config_of('evaluate.py', {
    'init_from': str(folder), 'task': dict(name='math', path=str(path)), 'sampling': dict(max_new_tokens=6),
    'eval': dict(problems=0, samples=2, temperature=0.6, top_p=0.95)})
  config.model = own_fields(from_hf_config(json.loads((folder / 'config.json').read_text()), 'config.json'))
  summary = launch(config, tmp_path / 'run')
  assert (summary['complete'], summary['problems'], summary['samples']) == (True, 5, 2)
  assert sum(summary['verdicts'].values()) == 10 and set(summary['by_level']) == {'1', '2'}
  lines = runs.lines(tmp_path / 'run' / 'answers.jsonl')
  assert {line['id'] for line in lines} == set(range(5))  # the whole file, nothing is taken away for training
  assert launch(config, tmp_path / 'run') == summary  # nothing is left to do
  config.sampling.max_new_tokens = 7
  with pytest.raises(ValueError, match='config.sampling.max_new_tokens was 6, is 7'):
    launch(config, tmp_path / 'run')
