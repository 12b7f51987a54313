"""What a result was made with: the code's commit, the versions of what it runs on."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess

import moe_rl
from moe_rl.runtime.run import replace

PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'math-verify', 'sentencepiece', 'tokenizers', 'py3langid')


def code_version() -> dict:
  """{'commit': of the checkout that the code runs from, None without one; 'changed': whether files differ from it;
  'versions': of packages, None for those that are not installed}."""
  root = pathlib.Path(moe_rl.__file__).parents[1]
  commit = _git(root, 'rev-parse', 'HEAD') if (root / '.git').exists() else None
  changed = None if commit is None else bool(_git(root, 'status', '--porcelain', '--untracked-files=no'))
  return {'commit': commit, 'changed': changed,
          'versions': {'moe_rl': moe_rl.__version__, 'python': platform.python_version(),
                       **{name: _version(name) for name in PACKAGES}}}


def write_json(path: pathlib.Path, record: dict):
  """The record as a file that is whole or not there."""
  replace(path, json.dumps(record, indent=1, ensure_ascii=False) + '\n')


def _git(root: pathlib.Path, *arguments: str) -> str | None:
  try:
    done = subprocess.run(['git', '-C', str(root), *arguments], capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.TimeoutExpired):  # no git here
    return None
  return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None
