"""The programs of an experiment, made for a slice: config -> checks -> mesh -> stage -> `programs()`."""

import dataclasses

import ml_collections

from moe_rl.planner import topologies
from moe_rl.runtime.programs import Program

STAGES = ('pretrain', 'sft', 'rl', 'reward_model')


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
    raise ValueError(f"config.stage '{config.stage}' cannot be planned: give an experiment of one stage of "
                     f"{', '.join(STAGES)}")
  config = ml_collections.ConfigDict(config.to_dict())
  if config.stage == 'sft':
    config.sft.path = config.sft.path or 'given when it runs'
    config.sft.row_tokens = config.sft.row_tokens or config.model.max_length
  if config.stage == 'reward_model':
    c = config.reward_model
    c.path, c.row_tokens = c.path or 'given when it runs', c.row_tokens or 2 * config.model.max_length
  if config.stage == 'rl':
    config.task.path = config.task.path or 'given when it runs'
    s = config.sampling
    room = max(1, config.model.max_length - s.max_new_tokens)
    s.max_prompt_tokens = s.max_prompt_tokens or min(prompt_tokens, room)
  return config


def check(config, devices: int) -> tuple[dict, object]:
  """(mesh sizes, config with its lengths). Raises ValueError with the remedy for what does not divide or fit."""
  from moe_rl import config as configs
  from moe_rl import validation
  from moe_rl.runtime.mesh import rows_over
  validation.validate(config, devices, vocab_size=0)
  sizes = configs.mesh_sizes(config, devices)
  if config.stage == 'rl':
    config = configs.with_lengths(config, config.sampling.max_prompt_tokens, rows_over(sizes))
  if config.stage == 'sft':
    config = configs.with_row_tokens(config, config.sft.row_tokens, rows_over(sizes))
  if config.stage == 'reward_model':
    config = configs.with_example_length(config, config.reward_model.row_tokens, rows_over(sizes))
  return sizes, config


def not_by_hosts(config, topology) -> list[str]:
  """Why the slice's hosts would not run this, if so; config: as `check` returns it. A plan needs no hosts."""
  from moe_rl import config as configs
  from moe_rl import validation
  from moe_rl.runtime.mesh import rows_over
  try:
    validation.check_hosts(config, rows_over(configs.mesh_sizes(config, topology.devices)), topology.hosts)
  except ValueError as e:
    return [f'more than its {topology.hosts:,} hosts can do today, each with prompts and rows of its own: {e}']
  return []


def make(topology, config: dict) -> Made:
  """config: as a plain dict, from `for_planning`. Called where programs are compiled."""
  from moe_rl.planner.estimate import steps_of
  from moe_rl.runtime.mesh import make_mesh
  from moe_rl.stages import pretrain, reward_model, rl, sft
  sizes, config = check(ml_collections.ConfigDict(config), topology.devices)
  mesh = make_mesh(sizes, topologies.devices(topology))
  made = {'pretrain': lambda: pretrain.Pretraining(config, mesh), 'rl': lambda: rl.RL(config, mesh, Ending()),
          'sft': lambda: sft.SFT(config, mesh, steps_of(config)),
          'reward_model': lambda: reward_model.RewardModelling(config, mesh, steps_of(config))}
  stage = made[config.stage]()
  return Made(stage.programs(), mesh, stage.abstract)
