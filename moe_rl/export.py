"""Any checkpoint to a Hugging Face folder, which `transformers` loads as it is.

`python -m moe_rl.export --init_from=ANY --out=DIR [--dtype=bfloat16|float32] [--fp8] [--tokenizer=PATH]`

ANY: a Hugging Face folder or hub id, a .safetensors file of ours, a run's workdir, or 'embedded'. The tokenizer that is
known to belong to the weights is written beside them; --tokenizer names another. An existing folder is refused, and a
failed export leaves nothing behind. As a stage of an experiment, --config.stage=export writes config.model.param_dtype.
"""

import argparse
import dataclasses
import json
import sys

from moe_rl.models.checkpoints import open_checkpoint
from moe_rl.models.hf_export import DTYPES, make_take
from moe_rl.runtime import mesh as meshes
from moe_rl.stages.export import convert


def run(init_from: str, out: str, form: str = 'bfloat16', tokenizer: str = '') -> dict:
  """Exports on one device; returns what was written. Raises ValueError as the stage does."""
  checkpoint = open_checkpoint(init_from)
  # FP8 is rounded once, from float32.
  model = dataclasses.replace(checkpoint.model, param_dtype='bfloat16' if form == 'bfloat16' else 'float32')
  mesh = meshes.one_device_mesh()
  return convert(checkpoint, model, out, form, tokenizer, mesh, make_take(mesh))


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog='python -m moe_rl.export', description=__doc__.splitlines()[0])
  parser.add_argument('--init_from', required=True, help='a checkpoint: a folder, a hub id, a file of ours, a run')
  parser.add_argument('--out', required=True, help='the folder to write, new or empty')
  parser.add_argument('--dtype', default='bfloat16', choices=tuple(DTYPES), help='of the weights')
  parser.add_argument('--fp8', action='store_true', help='matrices as E4M3 with a scale a block of 128 x 128')
  parser.add_argument('--tokenizer', default='', help="of the weights, if it does not lie with them: 'tiny' or a path")
  args = parser.parse_args(argv)
  try:
    done = run(args.init_from, args.out, 'fp8' if args.fp8 else args.dtype, args.tokenizer)
  except ValueError as e:  # bad input: the message is for a person, a traceback is not
    print(f'error: {e}', file=sys.stderr)
    return 2
  print(json.dumps(done, indent=1))
  return 0


if __name__ == '__main__':
  sys.exit(main())
