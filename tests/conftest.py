"""What every test shares: the session's environment, and the way to the public problem files."""

from pathlib import Path

import pytest
import session

session.begin()  # no test module has imported jax yet

# A file stays on one process, so the long ones come first, longest first, and both processes have work until the end.
LONG = ('hosts', 'mesh', 'resume', 'planner', 'notebooks', 'families', 'base', 'pipeline', 'general', 'sft', 'run',
        'evaluate', 'refill', 'reward_model', 'chat', 'sampler', 'update')


def pytest_collection_modifyitems(items):
  rank = {f'test_{name}.py': place for place, name in enumerate(LONG)}
  items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


@pytest.fixture(scope='session')
def mesh():
  """The mesh of a single device."""
  from moe_rl.runtime.mesh import one_device_mesh
  return one_device_mesh()


@pytest.fixture(scope='session')
def take(mesh):
  """What an export takes tensors out with."""
  from moe_rl.models.hf_export import make_take
  return make_take(mesh)


@pytest.fixture(scope='session')
def shared_data() -> Path:
  """The folder of public problem files, `../shared/data` from the repository; skips where it is missing."""
  path = Path(__file__).resolve().parents[2] / 'shared' / 'data'
  if not path.is_dir():
    pytest.skip(f'no problem files: {path} is not a folder')
  return path
