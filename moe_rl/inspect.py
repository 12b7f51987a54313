"""What a checkpoint holds: family, config, sizes, and which tensors are missing or superfluous. Reads headers only.

`python -m moe_rl.inspect PATH`

PATH: a Hugging Face folder or hub id, a .safetensors file of ours, a run's workdir, or 'embedded'. The exit status is 1
if a tensor is missing, superfluous, or of another shape or dtype than its config says; 2 if it cannot be read at all.
"""

import argparse
import collections
import dataclasses
import math
import sys

from moe_rl.models.checkpoints import Checkpoint, Faults, faults, open_checkpoint
from moe_rl.models.config import ModelConfig, own_fields
from moe_rl.models.hf_config import family
from moe_rl.models.transformer import parameter_count

KINDS = {'hub': 'Hugging Face folder', 'file': 'file of moe_rl', 'run': 'run of moe_rl'}
SHOWN = 20  # names of each kind of fault


def active_parameters(model: ModelConfig) -> int:
  """Weights that a token passes through, both embeddings counted whole and the prediction module not: of the routed
  experts the picked ones alone."""
  idle = model.moe_layers * (model.experts - model.top_k) * 3 * model.width * model.expert_ff
  return parameter_count(model) - idle


def report(checkpoint: Checkpoint, found: Faults) -> str:
  """The text that the command prints."""
  model = checkpoint.model
  try:
    kind = family(model)
  except ValueError as e:
    kind = f'none of the hub ({e})'
  rows = [('checkpoint', f'{checkpoint.path}' + (f', step {checkpoint.step}' if checkpoint.step else '')),
          ('kind', KINDS[checkpoint.kind]), ('family', kind)]
  rows += [(f'model.{name}', value) for name, value in own_fields(model).items()]
  rows += [('parameters', f'{parameter_count(model):,} in all, {active_parameters(model):,} active a token')]
  if model.mtp_layers:
    rows.append(('prediction', f'{parameter_count(model, mtp=True) - parameter_count(model):,} parameters more'))
  sizes = collections.Counter()
  for tensor in checkpoint.tensors.values():
    sizes[str(tensor.dtype)] += math.prod(tensor.shape) * tensor.dtype.itemsize
  rows.append(('tensors', f'{len(checkpoint.tensors):,}'))
  rows += [(f'bytes {dtype}', f'{size:,}') for dtype, size in sizes.most_common()]
  for name, values in dataclasses.asdict(found).items():
    rows.append((name, f'{len(values):,}' if values else 'none'))
    rows += [('', value) for value in values[:SHOWN]]
    rows += [('', f'… and {len(values) - SHOWN:,} more')] if values[SHOWN:] else []
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'{name:<{width}}  {value}' for name, value in rows)


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog='python -m moe_rl.inspect', description=__doc__.splitlines()[0])
  parser.add_argument('path', help='a checkpoint: a folder, a hub id, a file of ours, a run')
  try:
    checkpoint = open_checkpoint(parser.parse_args(argv).path)
    found = faults(checkpoint, checkpoint.model)
    print(report(checkpoint, found))
  except ValueError as e:  # bad input: the message is for a person, a traceback is not
    print(f'error: {e}', file=sys.stderr)
    return 2
  return 1 if found else 0


if __name__ == '__main__':
  sys.exit(main())
