"""R1-Zero on public problems, with checkpoint and tokenizer as the hub has them: a small random Qwen2 for 20 steps."""

import json

import pytest
import runs
from hub import TIED, write_hub
from vocabularies import write

from moe_rl.main import launch
from moe_rl.models.config import own_fields
from moe_rl.models.hf_config import from_hf_config

pytestmark = pytest.mark.data
STEPS = 20
# Training file, evaluation file, and how many of its first eight prompts have at most 512 tokens of this vocabulary.
FILES = {'gsm8k': ('gsm8k/train.jsonl', 'gsm8k/test.jsonl', 8),
         'math': ('math/math_train_7474.json', 'math/math500_test.jsonl', 7)}


@pytest.mark.parametrize('task', FILES)
def test_r1_zero_runs_on_real_problems_from_a_hub_checkpoint(task, shared_data, tmp_path):
  # Numbers of the size that training leaves: with a deviation of 1, softmaxes over hundreds of cells are all or nothing
  # and magnify rounding to 2e-4 nats.
  folder = write_hub(tmp_path / 'qwen', TIED, 'float32', std=0.3, vocab_size=384, max_position_embeddings=4096,
                     rope_scaling=None)
  write(folder, 'qwen')
  train, test = (shared_data / name for name in FILES[task][:2])
  config = runs.config_of('r1_zero.py', {
    'init_from': str(folder), 'tokenizer': str(folder), 'template': 'chat',
    'task': dict(name=task, path=str(train), eval_path=str(test)),
    'sampling': dict(max_prompt_tokens=512, max_new_tokens=16, temperature=0.2),
    'rl': dict(steps=STEPS, prompts_per_step=4, group_size=2, replay_routing=False), 'optim': dict(warmup_steps=0),
    'rewards': dict(weights='accuracy=1,format=0.1,repetition=1'),
    'eval': dict(every=0, problems=8, samples=1), 'checkpoint': dict(every=0)})
  config.model = own_fields(from_hf_config(json.loads((folder / 'config.json').read_text()), 'config.json'))
  summary = launch(config, tmp_path / 'run')
  assert summary['complete'] and summary['steps'] == STEPS
  assert summary['samples'] == sum(summary['verdicts'].values()) == STEPS * 4 * 2
  assert summary['verdicts']['unparsable_reference'] == 0
  assert summary['sampler_trainer_gap'] <= 1e-4  # law 1, on prompts of hundreds of tokens
  assert summary['last']['problems'] == FILES[task][2]
  steps = runs.metrics(tmp_path / 'run')
  assert len(steps) == STEPS and all(50 < step['length/prompt'] <= 512 for step in steps)
  assert any(step['train/grad_norm'] > 0 for step in steps)  # noise repeats itself now and then, and is told so
