"""Shared by tests: a model that compiles in seconds, its variables, and the comparison of two trees."""

import functools

import flax.linen as nn
import jax
import numpy as np
import session

from moe_rl.models import transformer
from moe_rl.models.config import ModelConfig, preset

EOS = 1
# compiler_options of what is compiled as in a run; the other programs of the tests are compiled quickly (session.py).
AS_IN_A_RUN = session.as_in_a_run() if jax.default_backend() == 'cpu' else {}
run_jit = functools.partial(jax.jit, compiler_options=AS_IN_A_RUN)


def tiny_model(**changes) -> ModelConfig:
  """One dense and two MoE layers of width 32. init_std 0.3 gives logits a spread of nats, so that softmaxes matter."""
  sizes = dict(
    vocab_size=64, layers=3, dense_layers=1, width=32, dense_ff=48, heads=2, q_lora=0, kv_lora=16, nope_dim=8,
    rope_dim=4, v_dim=8, experts=4, shared_experts=1, top_k=2, expert_ff=16, mtp_layers=0, init_std=0.3, max_length=64)
  return preset('tiny', **(sizes | changes))


def tiny_variables(model: ModelConfig, seed: int = 0) -> dict:
  """Variables as `transformer.init` makes them, of numpy's numbers: compiling the init costs more than a test."""
  rng = np.random.default_rng(seed)
  shapes = nn.unbox(jax.eval_shape(lambda key: transformer.init(model, key), jax.random.key(0)))

  def fill(path, shape):
    if path[-1].key in ('scale', 'bias'):
      return np.full(shape.shape, path[-1].key == 'scale', shape.dtype)
    return rng.normal(0, model.init_std, shape.shape).astype(shape.dtype)
  return jax.tree_util.tree_map_with_path(fill, shapes)


def favouring(variables: dict, token: int, gain: float) -> dict:
  """The variables with one token's logit raised at every position, by about 0.6 nats for 1 of gain.

  Coordinate 0 of every embedding is set to 3 and no layer writes to it; so the final norm leaves it near 3 / 5 (5 is
  the hidden states' root mean square), and the token's output weight on it is raised by the gain.
  """
  variables = jax.tree.map(np.copy, variables)
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params']):
    if path[-1].key in ('out', 'down'):
      leaf[..., 0] = 0
  variables['params']['embed'][:, 0] = 3
  variables['params']['unembed'][0, token] += gain
  return variables


def assert_trees_close(actual, wanted, rtol: float):
  """Every leaf within rtol of the wanted leaf's largest entry: small entries are differences of terms of that size."""
  actual, wanted = jax.tree_util.tree_leaves_with_path(actual), jax.tree_util.tree_leaves_with_path(wanted)
  assert [path for path, _ in actual] == [path for path, _ in wanted]
  for (path, a), (_, w) in zip(actual, wanted, strict=True):
    a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
    np.testing.assert_allclose(a, w, rtol=0, atol=rtol * np.abs(w).max(), err_msg=jax.tree_util.keystr(path))
