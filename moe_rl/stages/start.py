"""Where a stage's weights come from: config.init_from, or random numbers."""

import dataclasses

import jax
import numpy as np

from moe_rl.models.checkpoints import Checkpoint, check, open_checkpoint
from moe_rl.models.config import ModelConfig, own_fields
from moe_rl.models.hf_import import load_variables
from moe_rl.runtime.programs import Program
from moe_rl.runtime.run import compare
from moe_rl.runtime.state import TrainState, abstract_state, make_adopt, make_init

# Fields of the model's config that change no number of a forward pass.
FREE_FIELDS = frozenset(('compute_dtype', 'param_dtype', 'remat', 'expert_path', 'init_std', 'max_length'))


class Start:
  """The way to a stage's first state: `init` is its jitted function, and a `Program` of the stage.

  free: fields of the model in which the weights of config.init_from may differ on purpose.
  """

  def __init__(self, config, model: ModelConfig, optimizer, mesh, reference: bool, free: tuple[str, ...] = (),
               reference_memory: str = 'device'):
    self.init_from, self.model, self.free = config.init_from, model, free
    self.abstract, self.shardings = abstract_state(model, optimizer, mesh, reference, reference_memory)
    self.init = (make_adopt(optimizer, self.shardings, reference) if config.init_from else
                 make_init(model, optimizer, self.shardings, config.seed, reference))

  def program(self) -> Program:
    return Program('init', self.init, (self.abstract.params,) if self.init_from else ())

  def state(self) -> TrainState:
    """Random weights, or those of config.init_from, of which no second copy is made but the reference.

    Raises ValueError before any compile, and before any data is read, where they do not fit config.model.
    """
    if not self.init_from:
      return self.init()
    model, params, fresh = self.model, dict(self.abstract.params), {}
    if model.head == 'scalar' and open_at(self.init_from).model.head == 'vocabulary':  # it gets a head of its own
      model, head = dataclasses.replace(model, head='vocabulary'), params.pop('scalar')
      fresh['scalar'] = jax.device_put(np.zeros(head.shape, head.dtype), head.sharding)
    wanted = {'params': params, 'router': self.abstract.router}
    variables = load_variables(open_for(self.init_from, model, self.free), model, wanted)
    variables['params'] |= fresh
    step, opt_state, reference = self.init(variables['params'])
    return TrainState(step, variables['params'], variables['router'], opt_state, reference)


def open_at(init_from: str) -> Checkpoint:
  """The checkpoint of config.init_from. Raises ValueError as `open_checkpoint` does, naming the key."""
  try:
    return open_checkpoint(init_from)
  except ValueError as e:
    raise ValueError(f'config.init_from {e}') from e


def open_for(init_from: str, model: ModelConfig, free: tuple[str, ...] = ()) -> Checkpoint:
  """The checkpoint of config.init_from, which a model of these sizes can be read from.

  Raises ValueError naming the fields of config.model that are not the checkpoint's, or the tensors that do not fit. A
  prediction module that the model does not have may be in the checkpoint. free: fields that may differ on purpose.
  """
  try:
    checkpoint = open_checkpoint(init_from)
    different = differences(checkpoint, model, free)
    remedy = f'Set config.model to its sizes: {"; ".join(different[:8])}' if different else ''
    check(checkpoint, model, remedy)
  except ValueError as e:
    raise ValueError(f'config.init_from {e}') from e
  if different:
    raise ValueError(f'config.init_from {checkpoint.where}: config.model differs from the model of these weights. '
                     f'{remedy}. (What should differ on purpose is changed in the config that lies with the weights)')
  return checkpoint


def differences(checkpoint: Checkpoint, model: ModelConfig, free: tuple[str, ...] = ()) -> list[str]:
  """A phrase for each field that changes numbers and is not the same; none for those that are free."""
  try:
    made_with = checkpoint.model
    if not model.mtp_layers:
      made_with = dataclasses.replace(made_with, mtp_layers=0)
    old, new = dataclasses.asdict(made_with), dataclasses.asdict(model)
  except ValueError:  # a config that is not whole
    old, new = checkpoint.fields, own_fields(model)
  old, new = ({k: v for k, v in fields.items() if k not in {*FREE_FIELDS, *free}} for fields in (old, new))
  return compare(old, new, 'model.')
