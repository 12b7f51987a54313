"""A checkpoint of any kind, opened: its config and the headers of its tensors, and what of it does not fit a model.

Kinds: 'hub', a Hugging Face folder or a hub id; 'file', one of our own .safetensors files; 'run', the folder of a run.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re

import flax
import flax.linen as nn
import jax
import numpy as np

from moe_rl.models import hf_names, transformer
from moe_rl.models.config import ModelConfig, from_fields
from moe_rl.models.fp8 import E4M3
from moe_rl.models.hf_config import family, from_hf_config
from moe_rl.models.hf_names import Slot
from moe_rl.models.safetensors_io import Tensor, read_folder, read_header
from moe_rl.models.weights import EMBEDDED
from moe_rl.runtime import saved

HUB_ID = re.compile(r'[\w.-]+/[\w.-]+(@[\w./-]+)?')
HUB_FILES = ('*.json', '*.safetensors', '*.model', '*.txt', '*.jinja')
KINDS = ("give the folder of a Hugging Face checkpoint, a hub id (ORGANISATION/NAME), a .safetensors file of moe_rl, "
         "the folder of a run, 'embedded', or '' for random weights where there is a choice")
FLOATS = frozenset(np.dtype(t) for t in (np.float64, np.float32, np.float16, jax.numpy.bfloat16))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """where: as people gave it, quoted, for messages; path: of the file or folder; fields: of its model's config;
  tensors: by name, without data (for a run with shape and dtype only); step: of a run's newest checkpoint."""

  where: str
  kind: str
  path: pathlib.Path
  fields: dict
  tensors: dict[str, Tensor | jax.ShapeDtypeStruct]
  step: int = 0

  @functools.cached_property
  def model(self) -> ModelConfig:
    """Its sizes. Raises ValueError if the config that came with it is damaged."""
    try:
      return from_fields(self.fields)
    except TypeError as e:
      raise ValueError(f'{self.where}: the model config that came with the weights is not one of moe_rl ({e}): '
                       'write the file again') from e

  def slots(self, model: ModelConfig) -> dict[str, Slot]:
    """Every tensor that a model of these sizes has in a checkpoint of this kind, scales included where this one is
    quantised, copies included."""
    if self.kind != 'hub':
      return {name: Slot(name, (), leaf.shape) for name, leaf in shapes(model).items()}
    slots = hf_names.names(model)
    quantised = (n for n, slot in slots.items() if slot.scaled and n in self.tensors and self.tensors[n].dtype == E4M3)
    return hf_names.with_scales(slots, quantised)


@functools.lru_cache(maxsize=8)
def boxed_shapes(model: ModelConfig) -> dict:
  """Shapes of the variables {'params': …, 'router': …}, boxed with their logical axes."""
  return {'router': {}} | jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))


def shapes(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of every variable by its path, 'params/…' or 'router/…'."""
  return flax.traverse_util.flatten_dict(nn.unbox(boxed_shapes(model)), sep='/')


# Opening.


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
  """Reads config and headers of a checkpoint of any kind.

  path: a Hugging Face folder, a hub id such as 'Qwen/Qwen2.5-Math-1.5B' (with '@revision' if wanted; the library's
  cache and its offline mode are honoured), a .safetensors file of ours, 'embedded' or 'embedded_dense' (the package's
  bases), or the folder of a run, whose newest checkpoint is meant. Raises ValueError, naming the path and the remedy,
  for what is none of these or is damaged.
  """
  where = f"'{path}'"
  found = EMBEDDED.get(str(path), pathlib.Path(path))
  if not found.exists():
    if str(path) != str(found) or not HUB_ID.fullmatch(str(path)):
      raise ValueError(f'{where}: cannot be read (there is no such file or folder): {KINDS}')
    found = _from_hub(str(path))
  try:
    return (_open_folder if found.is_dir() else _open_file)(where, found)
  except OSError as e:
    raise ValueError(f'{where}: cannot be read ({e.strerror})') from e
  except ValueError as e:
    raise ValueError(str(e) if str(e).startswith(where) else f'{where}: {e}') from e


def _from_hub(name: str) -> pathlib.Path:
  """The folder of a hub id, downloaded unless it is in the cache."""
  try:
    from huggingface_hub import snapshot_download
  except ImportError as e:
    raise ValueError(f"'{name}': no such folder, and a hub id needs huggingface_hub: pip install 'moe_rl[hf]', or give "
                     'a folder') from e
  repository, _, revision = name.partition('@')
  try:
    return pathlib.Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(HUB_FILES)))
  except (OSError, ValueError, RuntimeError) as e:  # what the library raises for absent, private, offline, unreachable
    why = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise ValueError(f"'{name}': no such folder, and as a hub id it is neither in the cache nor can it be downloaded "
                     f'({why}): check name and network, or give a local folder') from e


def _open_file(where: str, path: pathlib.Path) -> Checkpoint:
  try:
    metadata, tensors = read_header(path)
  except ValueError as e:
    raise ValueError(f'{where}: cannot be read ({e}): {KINDS}') from e
  if metadata.get('format') != 'moe_rl':
    raise ValueError(f'{where}: a safetensors file, but not one written by moe_rl: of a Hugging Face checkpoint give '
                     'the folder, with its config.json')
  return Checkpoint(where, 'file', path, json.loads(metadata.get('config', '{}')), tensors)


def _open_folder(where: str, path: pathlib.Path) -> Checkpoint:
  try:
    config = json.loads((path / 'config.json').read_text())
  except FileNotFoundError as e:
    raise ValueError(f'{where}: the folder has no config.json: {KINDS}') from e
  except ValueError as e:
    raise ValueError(f'{path / "config.json"}: not JSON ({e}): download or copy it again') from e
  if isinstance(config, dict) and 'stage' in config:
    return _open_run(where, path)
  model = from_hf_config(config, str(path / 'config.json'))
  tensors = read_folder(path)
  if not any(name.startswith(f'model.layers.{model.layers}.') for name in tensors):
    model = dataclasses.replace(model, mtp_layers=0)  # config.json often promises the module beside weights without it
  return Checkpoint(where, 'hub', path, dataclasses.asdict(model), tensors)


def _open_run(where: str, path: pathlib.Path) -> Checkpoint:
  config, step, tensors = saved.describe(path)
  # The prediction module is not kept by every stage.
  fields = config['model'] | {'mtp_layers': int(any(name.startswith('params/mtp/') for name in tensors))}
  return Checkpoint(where, 'run', path, fields, tensors, step)


def made_for(checkpoint: Checkpoint) -> tuple[str, str]:
  """(tokenizer as `load_tokenizer` takes it, name of the prompts' template) that are known to belong to the weights, ''
  for what is not known."""
  if checkpoint.kind == 'hub':
    return str(checkpoint.path), ''
  if checkpoint.kind == 'run':
    config = json.loads((checkpoint.path / 'config.json').read_text())
    return config['tokenizer'], config['template']
  return ('tiny', 'short') if checkpoint.path in EMBEDDED.values() else ('', '')


# Checking.


def check_speaks(checkpoint: Checkpoint):
  """Raises ValueError for the weights of a reward model, which have no logits."""
  if checkpoint.model.head == 'scalar':
    raise ValueError(f"{checkpoint.where}: a reward model, which gives a number and no tokens: give a language model "
                     "here, and this as --config.rewards.model of a run with the reward term `model`")


@dataclasses.dataclass(frozen=True)
class Faults:
  """missing, superfluous: names; wrong: a sentence each for a tensor of another shape or dtype."""

  missing: list[str]
  superfluous: list[str]
  wrong: list[str]

  def __bool__(self) -> bool:
    return bool(self.missing or self.superfluous or self.wrong)


def faults(checkpoint: Checkpoint, model: ModelConfig) -> Faults:
  """What keeps a model of these sizes from being read out of the checkpoint, from the headers alone.

  A prediction module that is in the checkpoint and not in the model is no fault, nor are copies that are absent.
  """
  wanted, known = checkpoint.slots(model), {}
  if checkpoint.fields.get('mtp_layers') and not model.mtp_layers:
    known = checkpoint.slots(dataclasses.replace(checkpoint.model, mtp_layers=1))
  if checkpoint.kind == 'hub':
    known |= hf_names.repeats(model)
  there = checkpoint.tensors
  missing = [name for name, slot in wanted.items() if not slot.copy and name not in there]
  wrong = [_wrong(name, slot, there[name]) for name, slot in (known | wanted).items() if name in there]
  return Faults(missing, sorted(there.keys() - wanted.keys() - known.keys()), [w for w in wrong if w])


def _wrong(name: str, slot: Slot, tensor) -> str:
  file = f'{tensor.file.name}: ' if isinstance(tensor, Tensor) else ''
  if tuple(tensor.shape) != slot.shape:
    text = f"{file}tensor '{name}' has shape {list(tensor.shape)}, the model needs {list(slot.shape)}"
    if slot.path in ('params/embed', 'params/unembed') and tensor.shape[1:] == slot.shape[1:]:
      size = 'larger' if slot.shape[0] > tensor.shape[0] else 'smaller'
      text += f' (the vocabulary of {slot.shape[0]} is {size} than the embedding, {tensor.shape[0]} rows)'
    return text
  if tensor.dtype not in FLOATS and not (slot.scaled and tensor.dtype == E4M3):
    return f"{file}tensor '{name}' is {tensor.dtype}, which is no dtype of weights here: convert it to bfloat16"
  return ''


def check(checkpoint: Checkpoint, model: ModelConfig, remedy: str = ''):
  """Raises ValueError for the `faults`, the gravest first; remedy: what to do about it, if the caller knows."""
  found = faults(checkpoint, model)
  if not found:
    return
  if found.missing or found.superfluous:
    what = f'missing {_some(found.missing)}, superfluous {_some(found.superfluous)}'
    places = sorted({checkpoint.tensors[name].file.name for name in found.superfluous[:3]
                     if isinstance(checkpoint.tensors[name], Tensor)})
    what += f' (in {", ".join(places)})' if places else ''
  else:
    what = found.wrong[0] + (f' (and {len(found.wrong) - 1} more tensors)' if found.wrong[1:] else '')
  raise ValueError(f'{checkpoint.where}: its weights do not fit the model: {what}. '
                   f'{remedy or _remedy(checkpoint, model, found)}')


def _some(names: list[str]) -> str:
  return f'{names[:3]}' + (f' and {len(names) - 3} more' if names[3:] else '')


def _remedy(checkpoint: Checkpoint, model: ModelConfig, found: Faults) -> str:
  if checkpoint.kind != 'hub':
    return 'Give the file or run that was written with this model'
  config = checkpoint.path / 'config.json'
  odd, looks = found.missing + found.superfluous, _looks_like(checkpoint.tensors)
  if odd and looks not in ('', family(model)):
    return (f'{config} says {family(model)}, the tensors are those of {looks}: correct model_type, or give the right '
            'folder')
  if found.missing == ['lm_head.weight']:
    return f'If embedding and output are one matrix, set tie_word_embeddings to true in {config}; else download again'
  if odd and all(name.startswith(f'model.layers.{model.layers}.') for name in odd):
    if found.missing:
      return 'The prediction layer is not whole: load with mtp_layers=0, or download it again'
    return f'If that is the prediction layer, set num_nextn_predict_layers to 1 in {config}'
  if found.wrong and 'vocabulary' in found.wrong[0]:
    return f'Correct vocab_size in {config}, or download the weights again'
  return f'Download the files again, or correct {config} if they are as they should be'


def _looks_like(tensors) -> str:
  """The family by the tensors' names, '' if none is recognised."""
  ends = {'.'.join(name.split('.')[-3:]) for name in tensors}
  if 'self_attn.kv_a_proj_with_mqa.weight' in ends:
    return 'deepseek_v3' if 'mlp.gate.e_score_correction_bias' in ends else 'deepseek_v2'
  for end, kind in (('q_proj.bias', 'qwen2'), ('q_norm.weight', 'qwen3'), ('q_proj.weight', 'llama')):
    if f'self_attn.{end}' in ends:
      return kind
  return ''
