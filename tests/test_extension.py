"""Context extension: weights go on with scaled positions and longer rows, in pre-training alone."""

import dataclasses

import jax
import ml_collections
import numpy as np
import pytest

from moe_rl import config as configs
from moe_rl.main import load_experiment
from moe_rl.models.config import Yarn
from moe_rl.runtime.mesh import make_mesh
from moe_rl.stages.pretrain import Pretraining
from moe_rl.stages.rl import RL

YARN = dataclasses.asdict(Yarn(factor=4.0, original_length=128))


def with_yarn(experiment: str):
  config = load_experiment(f'experiments/{experiment}')
  with config.unlocked():
    config.model.yarn = ml_collections.ConfigDict(YARN)
  return config, make_mesh(configs.mesh_sizes(config, 1), jax.devices()[:1])


def test_pretraining_goes_on_with_scaled_positions_and_longer_rows():
  config, mesh = with_yarn('context_extension.py')
  config.pretrain.rows_per_step = config.pretrain.microbatch_rows = 2
  stage = Pretraining(config, mesh)
  rows = {k: v.reshape(1, 2, 512) for k, v in next(stage.data()).items()}
  _, metrics = stage.update(stage.initial_state(), rows)
  # The base's own loss on rows of 128 is near 0.8 nats, random weights give log(384), 6 nats; new positions cost some.
  assert stage.model.yarn.factor == 4.0 and float(metrics['ce']) < 3 and np.isfinite(float(metrics['grad_norm']))


def test_elsewhere_other_positions_are_refused():
  config, mesh = with_yarn('r1_zero.py')
  config.sampling.max_prompt_tokens = 24
  stage = RL(configs.with_lengths(config, 24), mesh)
  with pytest.raises(ValueError, match='config.model.yarn'):
    stage.initial_state()
