"""Law 10: every key is read, and bad input is refused before any compile, with the remedy in the message."""

import dataclasses
import functools
import inspect
import json
import pathlib
import re

import jax
import ml_collections
import numpy as np
import pytest
import runs
import safetensors.numpy

from moe_rl import config as configs
from moe_rl import validation
from moe_rl.data.corpus import Mix
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.main import launch, load_experiment
from moe_rl.models.config import PRESETS, ModelConfig, own_fields
from moe_rl.models.weights import save_weights
from moe_rl.runtime.mesh import make_mesh
from moe_rl.runtime.run import CompileCounter, Run, compare
from moe_rl.stages.rl import RL

VOCABULARY = load_tokenizer('tiny').vocab_size
RL_CONFIG = runs.RL | {'init_from': ''}
REWARD_MODEL = {'init_from': '', 'model': runs.MODEL, 'reward_model': dict(path='pairs.jsonl')}
BASES = {'pretrain.py': runs.PRETRAIN, 'evaluate.py': runs.EVALUATE, 'rejection.py': runs.REJECTION,
         'reward_model.py': REWARD_MODEL}


@pytest.fixture(scope='module')
def compiles():
  return CompileCounter()


@pytest.fixture
def refusal(tmp_path, compiles):
  """(changes, experiment, workdir) -> the message of a start that is refused, having compiled and written nothing."""
  def start(changes: dict, experiment: str = 'r1_zero.py', workdir: pathlib.Path = tmp_path / 'run') -> str:
    base = BASES.get(experiment, RL_CONFIG)
    config = runs.config_of(experiment, base)
    config.update(changes)
    before, had = compiles.count, files(workdir)
    with pytest.raises(ValueError) as error:
      launch(config, workdir)
    assert compiles.count == before
    assert files(workdir) == had  # else the corrected start would find the folder of another config
    return str(error.value)
  return start


def files(folder: pathlib.Path) -> list[str]:
  return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()) if folder.is_dir() else []


def contains(message: str, *parts: str):
  for part in parts:
    assert part in message, message


# Each line: what is wrong, and parts of the message: the thing with its value, and the remedy.
BAD_RL = {
  'unknown stage': (dict(stage='rll'), "config.stage 'rll'", "'rl'"),
  'unknown template': (dict(template='shrt'), "config.template 'shrt'", "nearest: 'short'"),
  'vocabulary': (dict(model=dict(vocab_size=100)), 'config.model.vocab_size 100', f'set it to {VOCABULARY} or more'),
  'odd rope': (dict(model=dict(rope_dim=3)), 'config.model: rope_dim 3 must be even'),
  'too many experts a token': (dict(model=dict(top_k=5)), 'config.model: top_k 5', 'lower top_k'),
  'too few devices': (dict(mesh=dict(data=2)), 'needs 2 devices, there are 1', 'set one axis to -1'),
  'devices left over': (dict(mesh=dict(fsdp=3)), '1 devices do not divide by 3'),
  'two free axes': (dict(mesh=dict(fsdp=-1)), 'only one axis may be -1', 'fsdp'),
  'empty axis': (dict(mesh=dict(fsdp=0)), 'config.mesh', '1 or more, or -1'),
  'learning rate': (dict(optim=dict(lr=0.0)), 'config.optim.lr 0.0 must be positive'),
  'gradient norm': (dict(optim=dict(clip_norm=-1.0)), 'config.optim.clip_norm -1.0', '0 turns it off'),
  'no checkpoint kept': (dict(checkpoint=dict(keep=0)), 'config.checkpoint.keep 0: keep at least 1'),
  'no steps': (dict(rl=dict(steps=0)), 'config.rl.steps is 0, must be positive'),
  'cold': (dict(sampling=dict(temperature=0.0)), 'config.sampling.temperature is 0.0, must be positive'),
  'no problems': (dict(eval=dict(problems=0)), 'config.eval.problems is 0, must be positive'),
  'no time': (dict(rewards=dict(timeout_s=0.0)), 'config.rewards.timeout_s is 0.0, must be positive'),
  'no memory': (dict(rewards=dict(memory_mb=64)), 'config.rewards.memory_mb 64', 'set 512 or more'),
  'unknown term': (dict(rewards=dict(weights='accuracy=1,formt=1')), 'config.rewards.weights', "did you mean 'format'"),
  'weight': (dict(rewards=dict(weights='accuracy=1,format=much')), "'format=much' has no number", 'format=0.5'),
  'no term': (dict(rewards=dict(weights='accuracy=0')), 'config.rewards.weights', 'leaves no term with a weight'),
  'unknown language': (dict(rewards=dict(weights='language:english=1')), "language 'english' is not known", 'en, zh'),
  'long cache': (dict(rewards=dict(weights='overlong:500=1')), 'overlong:500', 'more tokens than the longest response'),
  'model term without a model': (dict(rewards=dict(weights='accuracy=1,model=1')), 'has the term `model`',
                                 '--config.rewards.model=WORKDIR', 'leave the term out'),
  'model without its term': (dict(rewards=dict(model='runs/rm')), "config.rewards.model 'runs/rm'", 'add such'),
  'model term without prompts': (dict(rewards=dict(weights='accuracy=1,model=1', model='runs/rm')),
                                 '--config.task.general_path=FILE'),
  'general without a share': (dict(task=dict(general_path='p.jsonl')), 'config.rl.general_share 0.0', 'give both'),
  'a share of nothing': (dict(rl=dict(general_share=0.25)), "config.task.general_path ''", 'or neither'),
  'a share of all': (dict(rl=dict(general_share=1.0)), 'config.rl.general_share 1.0 must be in [0, 1)'),
  'a small share': (dict(task=dict(general_path='p.jsonl'), rl=dict(general_share=0.1)), 'is 0 prompts'),
  'general too early': (dict(rl=dict(general_from=-1)), 'config.rl.general_from -1 must not be negative'),
  'missing general prompts': (dict(task=dict(general_path='no/p.jsonl'), rl=dict(general_share=0.25)),
                              'no/p.jsonl: there is no such file'),
  'stage without its section': (dict(stage='pretrain'), "config.stage 'pretrain' reads config.pretrain",
                                "base_config(preset, 'pretrain')"),
  'objective': (dict(rl=dict(objective='drgrpo')), "config.rl.objective 'drgrpo'", "nearest: 'dr_grpo'"),
  'advantage': (dict(rl=dict(advantage='std')), "config.rl.advantage 'std'", 'group_std, group_mean, leave_one_out'),
  'estimator': (dict(rl=dict(kl='k4')), "config.rl.kl 'k4': use one of k1, k2, k3"),
  'clip': (dict(rl=dict(clip_low=0.0)), 'config.rl.clip_low is 0.0, must be positive'),
  'KL weight': (dict(rl=dict(kl_weight=-1.0)), 'config.rl.kl_weight -1.0 must not be negative; 0 turns it off'),
  'rounds': (dict(rl=dict(refill_rounds=-1)), 'config.rl.refill_rounds -1 must not be negative'),
  'old log-probs': (dict(rl=dict(old_logp='actor')), "config.rl.old_logp 'actor': use one of sampler, trainer"),
  'importance': (dict(rl=dict(importance='tis')), "config.rl.importance 'tis'", 'none, truncate, mask, mask_sequence'),
  'importance of nothing': (dict(rl=dict(importance='truncate')), "set config.rl.old_logp to 'trainer'"),
  'importance range': (dict(rl=dict(importance_range=(2.0, 0.5))), 'config.rl.importance_range (2.0, 0.5)',
                       'two numbers around 1'),
  'replay without experts': (dict(rl=dict(replay_routing=True), model=dict(dense_layers=2)),
                             'config.rl.replay_routing: the model has no experts'),
  'denominator': (dict(rl=dict(loss_denominator='tokens')), "config.rl.loss_denominator 'tokens'", "nearest: 'token'"),
  'unknown task': (dict(task=dict(name='gsm')), "config.task.name 'gsm'", "nearest: 'gsm8k'"),
  'task without a file': (dict(task=dict(name='gsm8k')), 'config.task.path is empty', '--config.task.path=FILE'),
  'few terms': (dict(task=dict(min_terms=1)), 'min_terms 1', '2 <= min <= max'),
  'small totals': (dict(task=dict(max_total=5)), 'config.task.max_total 5: at least 18'),
  'group of one': (dict(rl=dict(group_size=1)), 'config.rl.group_size 1', 'at least 2 completions'),
  'minibatches': (dict(rl=dict(minibatches=3)), 'config.rl.prompts_per_step 4', 'config.rl.minibatches 3', '3 or 6'),
  'top-p of nothing': (dict(sampling=dict(top_p=0.0)), 'config.sampling.top_p 0.0 must be in (0, 1]'),
  'top-p above 1': (dict(eval=dict(top_p=1.5)), 'config.eval.top_p 1.5 must be in (0, 1]'),
  'top-k': (dict(sampling=dict(top_k=-1)), 'config.sampling.top_k -1 must be in 0..384'),
  'negative length': (dict(sampling=dict(max_prompt_tokens=-1)), 'config.sampling.max_prompt_tokens -1', '0 to derive'),
  'short rows': (dict(rl=dict(row_tokens=16)), 'config.rl.row_tokens 16', 'a sample of 23 tokens', 'set it to 23 or'),
  'short rows for derived prompts': (dict(rl=dict(row_tokens=16), sampling=dict(max_prompt_tokens=0)),
                                     'config.rl.row_tokens 16', 'a sample of 23 tokens', 'or 0 to derive it'),
  'long answers': (dict(sampling=dict(max_new_tokens=60)), 'is 76', 'config.model.max_length 64', 'shorten one'),
  'long prompts': (dict(sampling=dict(max_prompt_tokens=8)), 'config.sampling.max_prompt_tokens 8 is too short',
                   'raise it'),
  'unknown tokenizer': (dict(tokenizer='/no/such.model'), "config.tokenizer '/no/such.model'", "use 'tiny' or"),
  'tokenizer of another kind': (dict(tokenizer='setup.py'), 'setup.py: not a sentencepiece model', '.model file'),
  'no such weights': (dict(init_from='/no/such.safetensors'), "config.init_from '/no/such.safetensors'",
                      "or '' for random weights"),
  'weights of another kind': (dict(init_from='setup.py'), "config.init_from 'setup.py': cannot be read"),
}
BAD_PRETRAIN = {
  'microbatches': (dict(pretrain=dict(rows_per_step=10)), 'config.pretrain.rows_per_step 10',
                   'config.pretrain.microbatch_rows 8', '8 or 16'),
  'long rows': (dict(pretrain=dict(row_tokens=65)), 'config.pretrain.row_tokens 65', 'config.model.max_length 64'),
  'shares': (dict(corpus=dict(direct=1.5)), 'config.corpus', 'is 1.52, must not exceed 1'),
  'no steps': (dict(pretrain=dict(steps=0)), 'config.pretrain.steps is 0'),
}
BAD_ANSWERS = {
  'nothing to evaluate': ('evaluate.py', dict(init_from=''), 'config.init_from is empty', "or 'embedded'"),
  'nothing to sample from': ('rejection.py', dict(init_from=''), 'config.init_from is empty', "a run's workdir"),
  'no such checkpoint': ('evaluate.py', dict(init_from='/no/such.run'), "config.init_from '/no/such.run'"),
  'no file': ('evaluate.py', dict(task=dict(name='math')), 'config.task.path is empty', '--config.task.path=FILE'),
  'no such file': ('evaluate.py', dict(task=dict(name='math', path='/no/such.jsonl')), '/no/such.jsonl: there is no'),
  'no such decontamination': ('rejection.py', dict(task=dict(
    name='gsm8k', path=str(runs.ROOT / 'tests/data/gsm8k_like.jsonl'), decontaminate='/no/such.jsonl')),
    '/no/such.jsonl: there is no'),
  'decontamination of chains': ('rejection.py', dict(task=dict(decontaminate='x.jsonl')), 'config.task.decontaminate',
                                'leave it empty'),
  'endless evaluation': ('evaluate.py', dict(eval=dict(problems=0)), 'config.eval.problems 0', 'has no end'),
  'endless sampling': ('rejection.py', dict(sample=dict(prompts=0)), 'config.sample.prompts 0', 'has no end'),
  'evaluated language': ('evaluate.py', dict(eval=dict(language='english')), 'config.eval.language', 'en, zh'),
  'language': ('rejection.py', dict(sample=dict(language='english')), 'config.sample.language', 'en, zh'),
  'what to keep': ('rejection.py', dict(sample=dict(keep='short')), "keep 'short'", "nearest: 'shortest'"),
  'share': ('rejection.py', dict(sample=dict(min_language=2.0)), 'config.sample.min_language 2.0 must be in 0..1'),
  'repetition': ('rejection.py', dict(sample=dict(min_repetition=0.5)), 'min_repetition 0.5 must be in -1..0'),
  'batch': ('rejection.py', dict(sampling=dict(batch_samples=0)), 'config.sampling.batch_samples is 0'),
}
BAD_REWARD_MODEL = {
  'kind': (dict(reward_model=dict(kind='harmless')), "config.reward_model.kind 'harmless': use one of helpfulness"),
  'no file': (dict(reward_model=dict(path='')), 'config.reward_model.path is empty', 'question, chosen, rejected'),
  'no file of safety': (dict(reward_model=dict(path='', kind='safety')), 'question, response, safe'),
  'missing file': (dict(reward_model=dict(path='no/pairs.jsonl')), 'no/pairs.jsonl: there is no such file'),
  'long rows': (dict(reward_model=dict(row_tokens=200)), 'config.reward_model.row_tokens 200', 'two answers', '64'),
  'no epochs': (dict(reward_model=dict(epochs=0)), 'config.reward_model.epochs is 0, must be positive'),
  'negative': (dict(reward_model=dict(eval_every=-1)), 'config.reward_model.eval_every -1 must not be negative'),
  'a language model': (dict(model=dict(head='vocabulary')), "config.model.head 'vocabulary'", "stage 'reward_model'"),
}
BAD_ON_EIGHT_DEVICES = {
  'prompts': (dict(mesh=dict(fsdp=2)), 'config.rl.prompts_per_step 4', '(data x fsdp x expert) 8', 'set it to 8'),
  'microbatches': (dict(rl=dict(prompts_per_step=8)), 'config.rl.microbatch_rows 4', '(data x fsdp x expert) 8'),
  'experts': (dict(mesh=dict(expert=8)), 'config.mesh.expert x tensor (8)', 'config.model.experts (4): take a divisor'),
  'heads': (dict(mesh=dict(tensor=4)), 'config.mesh.tensor (4)', 'config.model.heads (2): take a divisor'),
  'width': (dict(mesh=dict(fsdp=8), model=dict(width=36)), 'config.mesh.fsdp (8)', 'config.model.width (36): take a'),
  'vocabulary': (dict(mesh=dict(tensor=2), model=dict(vocab_size=385)), 'tensor (2) does not', 'vocab_size (385)'),
}


@pytest.mark.parametrize('name', BAD_RL)
def test_rl_refuses(name, refusal):
  changes, *parts = BAD_RL[name]
  contains(refusal(changes), *parts)


@pytest.mark.parametrize('name', BAD_PRETRAIN)
def test_pretraining_refuses(name, refusal):
  changes, *parts = BAD_PRETRAIN[name]
  contains(refusal(changes, 'pretrain.py'), *parts)


@pytest.mark.parametrize('name', BAD_ANSWERS)
def test_evaluation_and_rejection_sampling_refuse(name, refusal):
  experiment, changes, *parts = BAD_ANSWERS[name]
  contains(refusal(changes, experiment), *parts)


@pytest.mark.parametrize('name', BAD_REWARD_MODEL)
def test_training_of_a_reward_model_refuses(name, refusal):
  changes, *parts = BAD_REWARD_MODEL[name]
  contains(refusal(changes, 'reward_model.py'), *parts)


@pytest.mark.parametrize('name', BAD_ON_EIGHT_DEVICES)
def test_a_mesh_of_eight_refuses(name):
  changes, *parts = BAD_ON_EIGHT_DEVICES[name]
  config = runs.config_of('r1_zero.py', RL_CONFIG)
  config.update(changes)
  with pytest.raises(ValueError) as error:
    validation.validate(config, 8, VOCABULARY)
  contains(str(error.value), *parts)


# Data.


def problem_file(path: pathlib.Path, *rows: str) -> dict:
  path.write_text('\n'.join(rows) + '\n')
  return dict(task=dict(name='jsonl', path=str(path)))


def good(i: int) -> str:
  return json.dumps({'question': f'{i}+1=?', 'answer': str(i + 1)})


def test_a_missing_data_file_is_named_with_its_neighbour(tmp_path, refusal):
  (tmp_path / 'train.jsonl').write_text(good(1))
  message = refusal(dict(task=dict(name='jsonl', path=str(tmp_path / 'trian.jsonl'))))
  contains(message, str(tmp_path / 'trian.jsonl'), 'there is no such file', "nearest: 'train.jsonl'")


def test_a_malformed_line_is_named_with_its_number_and_why(tmp_path, refusal):
  path = tmp_path / 'train.jsonl'
  message = refusal(problem_file(path, good(1), '{"question": "2+2=?"}', good(3), '{"question": "4+', good(5)))
  contains(message, '2 of 5 records', f"{path}:2: field 'answer' is missing", f'{path}:4: is not valid JSON')


def test_prompts_that_are_all_too_long_are_refused_with_the_shortest(tmp_path, refusal):
  changes = problem_file(tmp_path / 'train.jsonl', *(good(10**20 + i) for i in range(20)))
  message = refusal(changes | dict(eval=dict(problems=4)))
  contains(message, 'every prompt is longer than config.sampling.max_prompt_tokens 16', 'the shortest has 27', 'raise')


def test_a_file_with_nothing_left_to_train_on_is_refused(tmp_path, refusal):
  message = refusal(problem_file(tmp_path / 'train.jsonl', *map(good, range(8))))
  contains(message, 'has 8 problems, not more than config.eval.problems 8', 'config.task.eval_path')


def test_fewer_problems_than_prompts_a_step_are_refused(tmp_path, refusal):
  message = refusal(problem_file(tmp_path / 'train.jsonl', *map(good, range(11))))
  contains(message, 'a batch of 4 is larger than its source of 3')


# Workdirs.


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, refusal):
  (tmp_path / 'file').write_text('')
  contains(refusal({}, workdir=tmp_path / 'file' / 'run'), f'--workdir {tmp_path}/file/run', 'choose another folder')


def test_the_workdir_of_another_config_is_refused_with_the_key_and_both_values(tmp_path, refusal):
  run = Run(runs.config_of('r1_zero.py', RL_CONFIG), tmp_path / 'run')
  run.restore({})  # begins the run
  run.close()
  message = refusal(dict(optim=dict(lr=0.5), rl=dict(group_size=8)))
  contains(message, f'--workdir {tmp_path}/run', 'config.optim.lr was 0.001, is 0.5',
           'config.rl.group_size was 4, is 8', 'Use another workdir')


def test_what_does_not_change_a_run_may_change_in_its_workdir():
  old = json.loads(runs.config_of('r1_zero.py', RL_CONFIG).to_json_best_effort())
  new = runs.config_of('r1_zero.py', RL_CONFIG | dict(
    mesh=dict(fsdp=2), checkpoint=dict(every=7), rewards=dict(workers=5)))
  assert compare(old, json.loads(new.to_json_best_effort())) == []


def test_checkpoints_without_a_config_are_refused(tmp_path, refusal):
  (tmp_path / 'run' / 'checkpoints' / '4').mkdir(parents=True)
  contains(refusal({}), 'has checkpoints but no config.json', 'use another')


# Weights.


def test_weights_of_another_model_are_refused_with_weight_and_key(tmp_path, refusal):
  other = runs.config_of('r1_zero.py', RL_CONFIG | dict(model=runs.MODEL | dict(kv_lora=24)))
  stage = RL(other, make_mesh(configs.mesh_sizes(other, 1), jax.devices()[:1]))
  params, router = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), (stage.abstract.params, stage.abstract.router))
  save_weights(tmp_path / 'base.safetensors', {'params': params, 'router': router}, own_fields(stage.model))
  message = refusal(dict(init_from=str(tmp_path / 'base.safetensors')))
  contains(message, str(tmp_path / 'base.safetensors'), 'params/dense/attention/', '24', '16',
           'config.model.kv_lora was 24, is 16')


def test_weights_with_another_number_of_parts_are_refused(tmp_path, refusal):
  save_weights(tmp_path / 'base.safetensors', {'params': {'embed': np.zeros((384, 32))}}, {})
  message = refusal(dict(init_from=str(tmp_path / 'base.safetensors')))
  contains(message, 'missing', 'attention/kv_down', 'superfluous []')


def test_weights_that_are_not_ours_are_refused(tmp_path, refusal):
  safetensors.numpy.save_file({'a': np.zeros(2)}, tmp_path / 'other.safetensors')
  contains(refusal(dict(init_from=str(tmp_path / 'other.safetensors'))), 'not one written by moe_rl')


# The command line: exit status 2, one message, no traceback.

BAD_COMMANDS = {
  'unknown key': (['--config=experiments/r1_zero.py', '--config.rl.stpes=3'], 'config.rl.stpes', '--config.rl.steps?'),
  'key of another section': (['--config=experiments/r1_zero.py', '--config.group_size=3'], '--config.rl.group_size?'),
  'wrong type': (['--config=experiments/r1_zero.py', '--config.rl.steps=abc'], '--config.rl.steps=abc',
                 'a whole number'),
  'unknown preset': (['--config=experiments/r1_zero.py:tinny'], "no preset 'tinny'", "did you mean 'tiny'?"),
  'no such experiment': (['--config=experiments/r1_zeroo.py'], "'experiments/r1_zeroo.py'", 'experiments/r1_zero.py?'),
  'no experiment': ([], '--config=experiments/r1_zero.py'),
  'unknown flag': (['--config=experiments/r1_zero.py', '--workdri=x'], '--workdri', '--workdir'),
  'not a flag': (['--config=experiments/r1_zero.py', 'rl.steps=3'], "'rl.steps=3'", '--config.rl.steps=50'),
  'bad size': (['--config=experiments/r1_zero.py', '--config.rl.group_size=1'], 'config.rl.group_size 1'),
}


@pytest.mark.parametrize('name', BAD_COMMANDS)
def test_the_command_line_refuses(name, tmp_path):
  arguments, *parts = BAD_COMMANDS[name]
  done = runs.main(*arguments, f'--workdir={tmp_path / "run"}')
  assert done.returncode == 2
  contains(done.stderr, 'error: ', *parts)
  assert 'Traceback' not in done.stderr + done.stdout
  assert not (tmp_path / 'run').exists()


# The keys.


def keys(config) -> dict[str, object]:
  """Leaves by dotted key."""
  out = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      out |= {f'{key}.{k}': v for k, v in keys(value).items()}
    else:
      out[key] = value
  return out


@functools.cache
def readers(section: str) -> str:
  """The sources that mention `config.SECTION`, without the base itself and its checks, which read to refuse only."""
  texts = [p.read_text() for p in (runs.ROOT / 'moe_rl').rglob('*.py')]
  checks = [function for name, function in vars(validation).items() if name.startswith('_validate_')]
  for function in (configs.base_config, validation.validate, *checks):
    own = inspect.getsource(function)
    texts = [t.replace(own, '') for t in texts]
  return '\n'.join(t for t in texts if f'config.{section}' in t)


def bases(*presets: str) -> list[ml_collections.ConfigDict]:
  return [configs.base_config(preset, stage) for preset in presets or PRESETS for stage in configs.STAGES]


def test_there_are_fewer_than_100_keys():
  """A way to scale positions, which is None or a section, counts as the one key that it is."""
  def count(base) -> int:
    return len({re.sub(r'^(model\.(yarn|llama3))\..*', r'\1', key) for key in keys(base)})
  assert all(20 < count(base) < 100 for base in bases())


def test_a_stage_shows_no_section_that_it_does_not_read():
  shown = {base.stage: {k for k in base if isinstance(base[k], ml_collections.ConfigDict)} for base in bases('tiny')}
  training = {'model', 'mesh', 'task', 'optim', 'checkpoint'}
  assert shown == {'pretrain': training | {'pretrain', 'corpus'}, 'export': {'model', 'mesh'},
                   'sft': training - {'task'} | {'sft'},
                   'rl': training | {'rl', 'sampling', 'rewards', 'eval'},
                   'reward_model': training - {'task'} | {'reward_model'},
                   'general_data': {'model', 'mesh', 'general_data'},
                   'evaluate': {'model', 'mesh', 'task', 'sampling', 'rewards', 'eval'},
                   'sample': {'model', 'mesh', 'task', 'sampling', 'rewards', 'sample'}}
  with pytest.raises(ValueError, match="stage 'pretrian': use one of pretrain, .* .nearest: 'pretrain'"):
    configs.base_config(stage='pretrian')


def test_every_key_is_read():
  models = '\n'.join(p.read_text() for p in (runs.ROOT / 'moe_rl' / 'models').glob('*.py'))
  corpus = (runs.ROOT / 'moe_rl' / 'data' / 'corpus.py').read_text()
  assert set().union(*(base.model for base in bases())) == {f.name for f in dataclasses.fields(ModelConfig)}
  assert set(configs.base_config(stage='pretrain').corpus) == {f.name for f in dataclasses.fields(Mix)}
  for key in sorted(set().union(*map(keys, bases()))):
    section, _, name = key.rpartition('.')
    text = readers(section or name) + {'model': models, 'corpus': corpus}.get(section.partition('.')[0], '')
    assert re.search(rf"\.{name}\b|'{name}'", text), f'config.{key} is read nowhere'


LISTS = ('distill_vs_rl.py', 'r1.py')
EXPERIMENTS = sorted(p.name for p in (runs.ROOT / 'experiments').glob('*.py') if p.name not in LISTS)


@pytest.mark.parametrize('path', EXPERIMENTS)
def test_an_experiment_changes_values_and_adds_no_key(path):
  for preset in PRESETS:
    config = runs.load_experiment(str(runs.ROOT / 'experiments' / path), preset)
    assert keys(config).keys() == keys(configs.base_config(preset, config.stage)).keys()


@pytest.mark.parametrize('path', LISTS)
def test_a_list_of_stages_adds_no_key_either(path):
  config = runs.load_experiment(str(runs.ROOT / 'experiments' / path))
  assert set(config.order) == set(config.stages)
  for section in (*config.stages.values(), config.evaluation):
    known = [keys(configs.base_config(preset, section.stage)).keys() for preset in ('tiny', 'tiny_dense')]
    assert keys(section).keys() in known
  with pytest.raises(ValueError, match='has the preset tiny alone'):
    runs.load_experiment(str(runs.ROOT / 'experiments' / path), 'v3_671b')


def test_a_microbatch_is_about_512_tokens_a_device_whatever_the_width_of_a_row():
  config = load_experiment('experiments/r1_zero.py')
  sizes = {}
  for prompt, devices in ((24, 1), (24, 8), (952, 1), (952, 8), (4000, 1)):
    r = configs.with_lengths(config, prompt, devices).rl
    sizes[prompt, devices] = (r.row_tokens, r.microbatch_rows)
  assert sizes == {(24, 1): (128, 4), (24, 8): (128, 32), (952, 1): (1024, 1), (952, 8): (1024, 8),
                   (4000, 1): (4080, 1)}
