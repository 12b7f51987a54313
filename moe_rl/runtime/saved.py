"""The weights of a run's newest checkpoint, read without the run: no optimizer state, no data cursor."""

import contextlib
import json
import pathlib

import flax
import jax
import orbax.checkpoint as ocp


@contextlib.contextmanager
def _manager(path: pathlib.Path):
  handlers = {'state': ocp.PyTreeCheckpointHandler(), 'host': ocp.JsonCheckpointHandler()}
  options = ocp.CheckpointManagerOptions(read_only=True)
  with ocp.CheckpointManager(path.absolute() / 'checkpoints', options=options, item_handlers=handlers) as manager:
    yield manager


def describe(path: pathlib.Path) -> tuple[dict, int, dict[str, jax.ShapeDtypeStruct]]:
  """(config.json of a run's folder, step of its newest checkpoint, that checkpoint's weights by path, as shapes).

  Raises ValueError for a folder without a whole checkpoint.
  """
  config = json.loads((path / 'config.json').read_text())
  step, shapes = None, {}
  if (path / 'checkpoints').is_dir():
    with _manager(path) as manager:
      step = manager.latest_step()
      if step is not None:
        tree = manager.item_metadata(step)['state'].tree
        flat = flax.traverse_util.flatten_dict({k: tree[k] for k in ('params', 'router')}, sep='/')
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}
  if step is None:
    raise ValueError(f"'{path}': a run's folder without a checkpoint: let the run reach its first one")
  return config, step, shapes


def restore(path: pathlib.Path, step: int, wanted: dict) -> dict:
  """The checkpoint's arrays for a tree of ShapeDtypeStruct with shardings, in its dtypes; the rest is not read."""
  with _manager(path) as manager:
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    got = manager.restore(step, args=ocp.args.Composite(
      state=ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)))
  return got['state']
