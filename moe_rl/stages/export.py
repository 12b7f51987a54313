"""Export: weights of any kind of checkpoint to a Hugging Face folder, WORKDIR/export, in config.model.param_dtype."""

import dataclasses
import json
import os
import pathlib
import shutil

import flax
import jax
import numpy as np

from moe_rl import config as configs
from moe_rl.data.hf_tokenizer import FILES
from moe_rl.data.tokenizer import load_tokenizer
from moe_rl.models import hf_names
from moe_rl.models.checkpoints import Checkpoint, check, check_speaks, made_for
from moe_rl.models.config import ModelConfig
from moe_rl.models.hf_export import Beside, announced, check_room, export, hub_config, make_take
from moe_rl.models.hf_import import abstract_variables, load_variables
from moe_rl.models.safetensors_io import size_of
from moe_rl.runtime.programs import Program
from moe_rl.stages.start import open_for


class Export:
  """The stage's pieces: the model, and the jitted function that takes a tensor out of it."""

  def __init__(self, config, mesh):
    self.config, self.mesh = config, mesh
    self.model = configs.model_config(config)
    self.take = make_take(mesh)

  def programs(self) -> list[Program]:
    leaves = flax.traverse_util.flatten_dict(abstract_variables(self.model, self.mesh), sep='/')
    axes = {slot.path: len(slot.index) for slot in hf_names.names(self.model).values()}
    return [Program(f'take {path}', self.take, (leaf, jax.ShapeDtypeStruct((axes[path],), np.int32)))
            for path, leaf in leaves.items()]


def run(config, workdir, mesh) -> dict:
  """Writes WORKDIR/export and a summary beside it; a workdir where that is done gives the summary again."""
  path, stage = pathlib.Path(workdir), Export(config, mesh)
  done, own = path / 'summary.json', json.loads(config.to_json_best_effort())
  if done.exists():
    summary = json.loads(done.read_text())
    if summary.get('config') != own:
      raise ValueError(f'--workdir {path} belongs to another config: use another workdir')
    return summary
  checkpoint = open_for(config.init_from, dataclasses.replace(stage.model, mtp_layers=0))
  model = dataclasses.replace(stage.model, mtp_layers=checkpoint.model.mtp_layers)  # not every stage keeps it
  summary = convert(checkpoint, model, path / 'export', model.param_dtype, config.tokenizer, mesh, stage.take)
  summary |= {'complete': True, 'config': own}
  if jax.process_index() == 0:
    done.write_text(json.dumps(summary, indent=1) + '\n')
  return summary


def convert(checkpoint: Checkpoint, model: ModelConfig, out: str | os.PathLike, form: str, tokenizer: str, mesh,
            take) -> dict:
  """Reads a model of these sizes, in its param_dtype, and writes the folder `out` as `form`; see `hf_export.export`.

  tokenizer: as `load_tokenizer` takes it, or '' for the one that is known to belong to the weights, if any. What can be
  refused is refused before the weights are read.
  """
  check_speaks(checkpoint)
  check(checkpoint, model)
  if jax.process_index() == 0:  # the one that writes
    check_room(pathlib.Path(out).absolute(), size_of(announced(model, form)))
  beside = companions(checkpoint, model, tokenizer)
  hub_config(model, form, beside)
  variables = load_variables(checkpoint, model, abstract_variables(model, mesh))
  return export(model, variables, out, take=take, form=form, beside=beside)


def companions(checkpoint: Checkpoint, model: ModelConfig, tokenizer: str) -> Beside:
  """Ids and tokenizer files. Raises ValueError for a tokenizer with ids that the model has no embedding for."""
  if not tokenizer and checkpoint.kind == 'hub':
    return _of_folder(checkpoint.path)
  tokenizer = tokenizer or made_for(checkpoint)[0]
  if not tokenizer:
    return Beside()
  found = load_tokenizer(tokenizer)
  if found.vocab_size > model.vocab_size:
    raise ValueError(f'{found.source}: its vocabulary ({found.vocab_size}) is larger than the embedding of the model '
                     f'({model.vocab_size} rows): give the tokenizer that the model was trained with')
  ends = list(found.eos_ids)
  ids = dict(bos_id=found.bos_id, eos_id=ends if ends[1:] else ends[0], pad_id=found.pad_id)
  return Beside(ids, _generation(ids), found.save)


def _of_folder(folder: pathlib.Path) -> Beside:
  """Ids and files of another Hugging Face folder, taken over as they are."""
  config = json.loads((folder / 'config.json').read_text())
  ids = {key: config.get(f'{key.removesuffix("_id")}_token_id') for key in ('bos_id', 'eos_id', 'pad_id')}

  def write(out: pathlib.Path):
    for name in (*FILES, 'generation_config.json'):
      if (folder / name).is_file():
        shutil.copyfile(folder / name, out / name)
  return Beside(ids, _generation(ids), write)


def _generation(ids: dict) -> dict:
  return {f'{key.removesuffix("_id")}_token_id': value for key, value in ids.items() if value is not None}
