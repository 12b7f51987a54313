"""A run seen from outside: what it prints, counts and leaves in its folder, and which programs it compiles."""

import json
import signal

import numpy as np
import pytest
import runs

from moe_rl import config as configs
from moe_rl.data.prompts import load_prompts
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.main import launch
from moe_rl.rl.rewards.verdicts import VERDICTS
from moe_rl.runtime import cores
from moe_rl.runtime.run import Run

STEPS = runs.RL['rl']['steps']
SAMPLES = runs.RL['rl']['prompts_per_step'] * runs.RL['rl']['group_size']  # a step
DEVICES = cores.candidates(runs.MODEL['width'])[0]  # this machine's cores, where there are some
MAX_NEW = runs.RL['sampling']['max_new_tokens']


@pytest.fixture(scope='module')
def workdir():
  return runs.trained()[0]


@pytest.fixture(scope='module')
def printed():
  return runs.trained()[1]


# Law 10: the derived sizes.


def test_derived_sizes_are_printed_before_the_run(printed):
  head = dict(line.split(None, 1) for line in printed[:printed.index('workdir')].strip().splitlines())
  assert head == {
    'backend': 'cpu', 'devices': str(DEVICES), 'mesh': f'data={DEVICES} x expert=1 x fsdp=1 x tensor=1',
    'samples_per_step': '16',
    'samples': str(16 * STEPS), 'updates_per_step': '2',
    'objective': 'grpo_token: advantage group_std, ratio by token in 0.8..1.28 (clip), mean by token, '
                 'KL k3 x 0.001 in the loss, refill_rounds 0, overlong_filter False',
    'longest_sample_tokens': '23', 'eval_samples': '16'}


def test_pretraining_prints_its_tokens():
  head = runs.pretrained()[1]
  assert 'tokens_per_step  768' in head and 'tokens  46,080' in head and 'microbatches  2' in head


# Law 7: everything is counted.


def test_verdicts_add_up_to_the_samples(workdir):
  summary = runs.summary(workdir)
  assert summary['samples'] == STEPS * SAMPLES == sum(summary['verdicts'].values())
  assert set(summary['verdicts']) == set(VERDICTS)
  for line in runs.metrics(workdir):
    assert sum(line[f'verdict/{v}'] for v in VERDICTS) == SAMPLES
  by_step = {v: sum(line[f'verdict/{v}'] for line in runs.metrics(workdir)) for v in VERDICTS}
  assert by_step == summary['verdicts']
  assert summary['verdicts']['correct'] > 0 and summary['verdicts']['wrong'] > 0
  assert summary['verdicts']['unparsable_reference'] == 0
  for evaluation in runs.lines(workdir / 'evaluations.jsonl'):
    assert sum(evaluation['verdicts'].values()) == evaluation['problems'] * evaluation['samples'] == 16


def test_truncated_answers_are_counted(workdir):
  truncated = [line['length/truncated'] for line in runs.metrics(workdir)]
  # 7 new tokens hold an answer at once but not one with a word of thought, so both kinds occur in this run.
  assert 0 < sum(truncated) < len(truncated)
  assert all((share * SAMPLES).is_integer() for share in truncated)
  for line in runs.metrics(workdir):
    assert line['length/max'] <= MAX_NEW
    assert not line['length/truncated'] or line['length/max'] == MAX_NEW


def test_tied_groups_are_counted_and_move_nothing(workdir):
  lines = runs.metrics(workdir)
  assert 0 < np.mean([line['reward/tied_groups'] for line in lines]) <= 1
  tied = [line for line in lines if line['reward/tied_groups'] == 1]
  # With all advantages 0, what is left is the KL term, 1e-3 of a k3 estimate of at most 0.01 nats a token.
  assert tied and all(abs(line['train/loss']) < 1e-4 for line in tied)


def test_prompts_left_out_are_counted_and_named(tmp_path):
  questions = ['1+1=?', '2+2=?', '1' * 40 + '=?', '3+3=?', '2' * 20 + '=?', '4+4=?', '5+5=?']
  path = tmp_path / 'problems.jsonl'
  path.write_text('\n'.join(json.dumps({'question': q, 'answer': '2'}) for q in questions))
  config = runs.config_of('r1_zero.py', runs.RL | dict(
    task=dict(name='jsonl', path=str(path)), eval=dict(problems=2), init_from=''))
  prompts = load_prompts(config, load_tokenizer('tiny'))
  assert (prompts.left_out, len(prompts.train), len(prompts.held_out)) == (2, 3, 2)
  assert prompts.notes[0] == f'3 training and 2 held-out prompts of {path}'
  assert 'left out 2 training prompts longer than config.sampling.max_prompt_tokens 16' in prompts.notes[1]
  assert 'the longest is problem 2 with 44 tokens' in prompts.notes[1]


# Law 1, in the run itself.


def test_sampler_and_trainer_agree_on_what_was_sampled(workdir):
  summary = runs.summary(workdir)
  gaps = [line['train/sampler_gap'] for line in runs.metrics(workdir)]
  # float32 in two orders of summing: 1e-6 typical, 1e-4 allowed. Taken before the second minibatch, whose weights
  # have moved on by more than this.
  assert 0 < summary['sampler_trainer_gap'] == max(gaps) <= 1e-4


def test_the_summary_has_what_people_look_for(workdir, printed):
  summary = runs.summary(workdir)
  assert summary['complete'] and summary['steps'] == STEPS and summary['seconds'] > 0
  assert (summary['first']['step'], summary['last']['step']) == (0, STEPS)
  for evaluation in (summary['first'], summary['last']):
    assert {'pass@1', 'pass@1_se', 'mean_tokens', 'format'} <= evaluation.keys()
    assert 0 <= evaluation['pass@1'] <= 1 and 1 <= evaluation['mean_tokens'] <= MAX_NEW
  assert json.loads(printed[printed.index('{'):]) == summary
  evaluations = runs.lines(workdir / 'evaluations.jsonl')
  assert [e['step'] for e in evaluations] == [0, 10, 20, STEPS]
  assert (evaluations[0], evaluations[-1]) == (summary['first'], summary['last'])
  assert [line['step'] for line in runs.metrics(workdir)] == list(range(1, STEPS + 1))


# Law 8: the programs.

LOWER_THE_LIST = """
import json, sys
import jax
from moe_rl import config as configs
from moe_rl.main import load_experiment
from moe_rl.runtime.mesh import make_mesh
from moe_rl.stages.pretrain import Pretraining
from moe_rl.runtime import cores
from moe_rl.stages.rl import RL
if sys.argv[1] != 'pretrain':
  cores.split(cores.candidates(32)[0])
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.rpartition('/')[2]))
config, out = load_experiment(f'experiments/{sys.argv[1]}.py'), {}
config.update(json.loads(sys.argv[2]))
stage = {'pretrain': Pretraining, 'r1_zero': RL}[sys.argv[1]]
made = stage(config, make_mesh(configs.mesh_sizes(config, jax.device_count())))
jitted = {id(v) for v in vars(made).values() if hasattr(v, 'lower')}
assert len(jitted) > 1 and jitted == {id(program.function) for program in made.programs()}
for program in made.programs():
  seen.clear()
  compiled = program.lower().compile()
  out[program.name] = dict(
    hits=seen.count('cache_hits'), misses=seen.count('cache_misses'), memory=compiled.memory_analysis() is not None)
print(json.dumps(out))
"""


def test_every_jitted_function_is_listed_and_compiles_from_abstract_arguments_to_the_program_of_the_run():
  """The runs have left each program they compiled in a cache, addressed by its text, shapes and shardings. Lowered from
  the list alone, in a process without a single array, every program is found there: the real calls have its shapes."""
  runs.trained()
  stages = {'pretrain': runs.PRETRAIN, 'r1_zero': runs.rl_changes()}
  made = [runs.start_python(LOWER_THE_LIST, name, json.dumps(changes)) for name, changes in stages.items()]
  pretrain, rl = (json.loads(runs.finish(process).stdout) for process in made)
  assert set(pretrain) == {'init', 'pretrain update'}
  assert set(rl) - {'weights to sampler'} == {'init', 'rollout', 'evaluation', 'GRPO update'}
  found = [*pretrain.values(), *rl.values()]
  assert found == [{'hits': 1, 'misses': 0, 'memory': True}] * len(found)


def test_nothing_is_compiled_after_the_second_step(workdir):
  compiles = [line['time']['seconds/compiles'] for line in runs.lines(workdir / 'metrics.jsonl')]
  assert len(compiles) == STEPS and 0 < compiles[1] == compiles[-1]
  compiles = [line['time']['compiles'] for line in runs.lines(runs.pretrained()[0] / 'metrics.jsonl')]
  assert 0 < compiles[1] == compiles[-1]


# TensorBoard.


def test_tensorboard_has_the_curves_histograms_and_transcripts(workdir):
  board = runs.events(workdir)
  every_step = list(range(1, STEPS + 1))
  for tag in ('reward/accuracy', 'length/mean', 'train/loss', 'train/sampler_gap'):
    assert runs.steps_of(board.Scalars(tag)) == every_step, tag
  # The writer turns the @ of pass@1 into an underscore.
  assert runs.steps_of(board.Scalars('eval/pass_1')) == [0, 10, 20, STEPS]
  means = [event.value for event in board.Scalars('length/mean')]
  np.testing.assert_allclose(means, [line['length/mean'] for line in runs.metrics(workdir)], rtol=1e-6)  # float32
  histograms = board.Histograms('length/tokens')
  assert runs.steps_of(histograms) == every_step
  assert {event.histogram_value.num for event in histograms} == {SAMPLES}
  transcripts = board.Tensors('transcripts/text_summary')
  assert runs.steps_of(transcripts) == [5, 10, 15, 20, 25]
  text = transcripts[0].tensor_proto.string_val[0].decode()
  assert '=?' in text and '(answer ' in text and 'reward' in text and '```' in text


def test_a_run_in_this_process_gives_the_signals_back(tmp_path):
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  run = Run(configs.base_config(), tmp_path / 'run')
  run.catch_signals()
  assert signal.getsignal(signal.SIGTERM) != before[1]
  run.close()
  assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_launch_returns_the_summary_of_a_complete_run(workdir):
  config = runs.config_of('r1_zero.py', runs.rl_changes())
  assert launch(config, workdir) == runs.summary(workdir)
