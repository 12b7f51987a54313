"""Law 5: sharding is a table, and the mesh changes no number beyond rounding."""

import json

import jax
import numpy as np
import pytest
import runs
from jax.sharding import PartitionSpec

from moe_rl.runtime import mesh as meshes

# One step of pre-training, of fine-tuning and of RL from the same seed on each mesh, in processes with 8 CPU devices.
ONE_STEP_EACH = """
import json, sys
import flax, jax, numpy as np
from moe_rl import config as configs
from moe_rl.data.prompts import load_prompts
from moe_rl.main import load_experiment
from moe_rl.runtime.keys import key_for
from moe_rl.runtime.mesh import make_mesh
from moe_rl.runtime.run import Run
from moe_rl.stages.pretrain import Pretraining
from moe_rl.stages.rl import RL, sample_prompts
from moe_rl.stages.sft import SFT

def config_of(name, sizes):
  config = load_experiment(f'experiments/{name}.py')
  config.update(changes[name])
  config.mesh.update(sizes)
  return config

def flat(state):
  tree = {'params': state.params, 'first_moment': state.opt_state[1][0].mu}
  return {k: np.asarray(v) for k, v in flax.traverse_util.flatten_dict(tree, sep='/').items()}

def pretrain(config, mesh):
  stage, c = Pretraining(config, mesh), config.pretrain
  rows = {k: v.reshape(-1, c.microbatch_rows, c.row_tokens) for k, v in next(stage.data()).items()}
  state, metrics = stage.update(stage.init(), rows)
  written.append((stage, state))
  return {'loss': metrics['loss'], **flat(state)}

def sft(config, mesh):
  stage, c = SFT(config, mesh, 10), config.sft
  shape, rng = (c.rows_per_step // c.microbatch_rows, c.microbatch_rows, c.row_tokens), np.random.default_rng(0)
  place = np.broadcast_to(np.arange(c.row_tokens), shape)  # two examples of 16 a row, the rest is padding
  rows = {'ids': rng.integers(0, config.model.vocab_size, shape), 'positions': place % 16,
          'segments': np.where(place < 32, 1 + place // 16, 0), 'answer': (place % 16 > 5) & (place < 32)}
  state, metrics = stage.update(stage.init(), {k: v if k == 'answer' else v.astype(np.int32) for k, v in rows.items()})
  return {'loss': metrics['loss'], **flat(state)}

def restored_everywhere(folder):
  # Each mesh's checkpoint under each other mesh: {'A > B': how many numbers are not the same bits}
  differing = {}
  for i, (stage, state) in enumerate(written):
    config = stage.config.copy_and_resolve_references()
    run = Run(config, f'{folder}/{i}')
    assert run.restore(stage.abstract) is None  # a new folder
    run.save(1, state, {})
    run.close()
    for j, (other, _) in enumerate(written):
      run = Run(config, f'{folder}/{i}')
      _, got, _ = run.restore(other.abstract)
      run.close()
      for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(other.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
      differing[f'{i} > {j}'] = sum(int((np.asarray(a) != np.asarray(b)).sum()) for a, b in zip(
        jax.tree.leaves(got), jax.tree.leaves(state), strict=True))
  return differing

def rl(config, mesh):
  stage, r, s = RL(config, mesh), config.rl, config.sampling
  prompts = load_prompts(config, stage.tokenizer)
  batch = [prompts.train[i] for i in range(r.prompts_per_step)]
  state = stage.init()
  key = key_for(0, 'rollout', 0)
  rollout, _ = sample_prompts(stage.sample, state, stage.tokenizer, batch, s.max_prompt_tokens, key)
  reward = (rollout.response_BxGxS.sum(-1) % 5).astype(np.float32)  # any that differs within a group
  state, metrics = stage.learn(state, rollout, reward, np.ones(reward.shape, bool))
  return {'loss': metrics['loss'], 'entropy': metrics['entropy'], 'ids': rollout.response_BxGxS,
          'logp': rollout.logp_BxGxS, **flat(state)}

changes, every_mesh, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
written = []
for name, mesh_name in every_mesh:
  sizes = dict.fromkeys(('data', 'fsdp', 'expert', 'tensor'), 1)
  sizes |= {k: int(v) for k, v in (part.split('=') for part in mesh_name.split(','))}
  count = int(np.prod(list(sizes.values())))
  config = config_of(name, sizes)
  mesh = make_mesh(configs.mesh_sizes(config, count), jax.devices()[:count])
  step = {'pretrain': pretrain, 'sft': sft, 'r1_zero': rl}[name]
  np.savez(f'{out}/{name}_{mesh_name}.npz', **jax.device_get(step(config, mesh)))
if written:
  open(f'{out}/restored.json', 'w').write(json.dumps(restored_everywhere(f'{out}/checkpoints')))
"""
# Wider than the default 0.04, so that sampling depends on the weights; not so wide that rounding is amplified.
# The router keeps three picks within one of two groups of experts, so that tokens go to devices and not to picks.
MODEL = runs.MODEL | dict(init_std=0.15, experts=8, top_k=3, groups=2, kept_groups=1)
# Adam's first step is lr times the gradient's sign: where a gradient is about 0 its rounding shows, hence a small lr.
CHANGES = {
  'pretrain': runs.PRETRAIN | {'model': MODEL, 'optim': dict(lr=1e-4, warmup_steps=0)},
  'sft': {'model': MODEL, 'init_from': '', 'optim': dict(lr=1e-4, final_lr=1e-4),
          'sft': dict(rows_per_step=16, row_tokens=48, microbatch_rows=8)},
  'r1_zero': runs.RL | {
    'model': MODEL, 'init_from': '', 'sampling': dict(max_prompt_tokens=16, max_new_tokens=16),
    'rl': dict(prompts_per_step=8, group_size=4, row_tokens=48, microbatch_rows=8, minibatches=1, steps=10)}}
ONE = 'data=1'
EIGHT = [(stage, mesh) for stage in CHANGES for mesh in ('data=8', 'data=2,fsdp=4', 'fsdp=2,expert=2,tensor=2')]


@pytest.fixture(scope='module')
def step(tmp_path_factory):
  """(stage, mesh) -> what its one step gave, by name."""
  out = tmp_path_factory.mktemp('mesh')
  pairs = {name: [(name, ONE), *(pair for pair in EIGHT if pair[0] == name)] for name in CHANGES}
  both = [runs.start_python(ONE_STEP_EACH, json.dumps(CHANGES), json.dumps(each), out,
                            devices=8)
          for each in (pairs['pretrain'] + pairs['sft'], pairs['r1_zero'])]
  for process in both:
    runs.finish(process)

  def load(stage, mesh):
    return dict(np.load(out / f'{stage}_{mesh}.npz'))
  load.folder = out
  return load


@pytest.mark.parametrize('mesh', [mesh for stage, mesh in EIGHT if stage == 'r1_zero'])
def test_the_same_tokens_are_sampled_on_every_mesh(mesh, step):
  one, other = step('r1_zero', ONE), step('r1_zero', mesh)
  assert one['ids'].shape == (8, 4, 16) and len(np.unique(one['ids'])) > 50
  np.testing.assert_array_equal(other['ids'], one['ids'])
  np.testing.assert_allclose(other['logp'], one['logp'], atol=1e-5)  # nats; float32 sums in another order


@pytest.mark.parametrize('stage, mesh', EIGHT)
def test_one_step_gives_the_same_loss_gradient_and_weights_on_every_mesh(stage, mesh, step):
  one, other = step(stage, ONE), step(stage, mesh)
  # The RL loss is a difference: at the weights that sampled, advantages of size 1 cancel to 0.
  np.testing.assert_allclose(other.pop('loss'), one.pop('loss'), rtol=1e-5, atol=1e-6)
  assert other.keys() == one.keys() and sum(name.startswith('first_moment/') for name in one) > 10
  for name, wanted in one.items():
    # 1e-5 of the largest entry: float32 sums over a few hundred terms in another order.
    np.testing.assert_allclose(other[name], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_a_checkpoint_written_under_one_mesh_is_the_same_bits_under_each_other(step):
  differing = json.loads((step.folder / 'restored.json').read_text())
  meshes_of = [mesh for stage, mesh in EIGHT if stage == 'pretrain']
  assert len(differing) == (len(meshes_of) + 1)**2 and set(differing.values()) == {0}


# The table.


def test_an_unknown_logical_axis_raises():
  with pytest.raises(ValueError, match="logical axis 'embde' is not in the sharding table .*embed"):
    meshes.spec(('embde', None))


def test_two_logical_axes_on_one_mesh_axis_raise_naming_both():
  with pytest.raises(ValueError, match="'mlp' and 'vocab' of .* both map to mesh axis 'tensor'"):
    meshes.spec(('mlp', 'vocab'))
  with pytest.raises(ValueError, match="'batch' and 'embed' of .* both map to mesh axis 'fsdp'"):
    meshes.spec(('batch', None, 'embed'))


def test_a_row_of_the_table_places_an_array():
  assert meshes.spec(('experts', 'expert_rows', 'expert_columns')) == PartitionSpec(
    ('expert', 'tensor'), ('fsdp',), None)
  assert meshes.spec(('layers', None)) == PartitionSpec(None, None)
  assert meshes.spec(('a',), {'a': ('data', 'fsdp')}) == PartitionSpec(('data', 'fsdp'))


def test_every_row_of_the_table_names_axes_of_the_mesh():
  for table in meshes.TABLES.values():
    assert {axis for axes in table.values() for axis in axes} == set(meshes.AXES)


def test_a_mesh_takes_its_sizes_by_name():
  sizes = dict(tensor=1, data=1, expert=1, fsdp=1)
  mesh = meshes.make_mesh(sizes, jax.devices()[:1])
  assert mesh.axis_names == meshes.AXES and dict(mesh.shape) == sizes


def test_a_batch_that_does_not_divide_is_refused_by_the_program_with_the_remedy(tmp_path):
  done = runs.main('--config=experiments/r1_zero.py', '--config.init_from=', '--config.rl.prompts_per_step=12',
                   f'--workdir={tmp_path / "run"}', devices=8)
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert ('config.rl.prompts_per_step 12 is not a multiple of the mesh (data x fsdp x expert) 8: set it to 8 or 16'
          in done.stderr)
