"""The programs of an experiment, made for a slice: config -> checks -> mesh -> stage -> `programs()`."""

import dataclasses

import ml_collections

from moe_rl.planner import topologies
from moe_rl.runtime.programs import Program

STAGES = ('pretrain', 'rl')


@dataclasses.dataclass(frozen=True)
class Made:
  """resident: a tree of the run's state (ShapeDtypeStructs with shardings), or None; notes: what was assumed, for
  people."""

  programs: list[Program]
  mesh: object
  resident: object = None
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ending:
  """As much of a tokenizer as a sampler is compiled with: some id ends a response; which one, changes nothing."""

  eos_ids: tuple[int, ...] = (1,)


def for_planning(config, prompt_tokens: int):
  """A copy of the config that needs no files: prompts are as long as said where config.sampling leaves it to the task.

  Raises ValueError for a stage that has no programs.
  """
  if config.stage not in STAGES:
    raise ValueError(f"config.stage '{config.stage}' runs no programs to plan: use one of {', '.join(STAGES)}")
  config = ml_collections.ConfigDict(config.to_dict())
  if config.stage == 'rl':
    config.task.path = config.task.path or 'given when it runs'
    s = config.sampling
    room = max(1, config.model.max_length - s.max_new_tokens)
    s.max_prompt_tokens = s.max_prompt_tokens or min(prompt_tokens, room)
  return config


def check(config, devices: int) -> tuple[dict, object]:
  """(mesh sizes, config with its lengths). Raises ValueError with the remedy for what does not divide or fit."""
  from moe_rl import config as configs
  from moe_rl.runtime.mesh import rows_over
  configs.validate(config, devices, vocab_size=0)
  sizes = configs.mesh_sizes(config, devices)
  if config.stage == 'rl':
    config = configs.with_lengths(config, config.sampling.max_prompt_tokens, rows_over(sizes))
  return sizes, config


def make(topology, config: dict) -> Made:
  """config: as a plain dict, from `for_planning`. Called where programs are compiled."""
  from moe_rl.runtime.mesh import AXES, make_mesh
  from moe_rl.stages import pretrain, rl
  sizes, config = check(ml_collections.ConfigDict(config), topology.devices)
  mesh = make_mesh(sizes, topologies.order(topology, tuple(sizes[a] for a in AXES)))
  stage = rl.RL(config, mesh, Ending()) if config.stage == 'rl' else pretrain.Pretraining(config, mesh)
  return Made(stage.programs(), mesh, stage.abstract)
