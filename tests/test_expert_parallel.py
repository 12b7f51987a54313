"""Experts on many devices: whatever the routing and the mesh, the same numbers as on one, and nothing is dropped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from moe_rl.models import expert_parallel, moe

ROWS, TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 8, 6, 16, 8, 8, 3
NOBODY = EXPERTS
# All of 8 devices: experts over 2, 4 and 8 of them, or on each; tokens that the tensor axis does not divide.
MESHES = ('data=2,fsdp=2,expert=2', 'fsdp=2,expert=2,tensor=2', 'expert=2,tensor=4', 'data=2,fsdp=4')
# A router that keeps a token's picks within two of four groups of experts: then it goes to two devices at most.
LIMITED = ('data=2,fsdp=2,expert=2 4,2', 'fsdp=2,expert=2,tensor=2 4,2')
ON_EACH = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from moe_rl.models import expert_parallel, moe
from moe_rl.runtime.mesh import AXES, Layout, make_mesh
expert_parallel.LEAST_BUFFER = 8  # so that small inputs need further rounds
names, meshes, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
given = dict(np.load(f'{folder}/given.npz'))
arrays = [given[k] for k in ('x', 'gate', 'w_gate', 'w_up', 'w_down')]
for text in meshes:
  mesh, _, routing = text.partition(' ')
  sizes = dict.fromkeys(AXES, 1) | {k: int(v) for k, v in (part.split('=') for part in mesh.split(','))}
  layout = Layout(make_mesh(sizes), routing=tuple(map(int, routing.split(','))) if routing else (1, 1))
  if routing:
    assert expert_parallel.most_devices(layout, given['gate'].shape[-1]) == 2

  @jax.jit
  def value_and_gradients(picked, cotangent, *arrays):
    y, pullback, load = jax.vjp(
      lambda x, gate, *w: expert_parallel.sharded(layout, moe.experts_of('auto', 'cpu'), x, picked, gate, *w),
      *arrays, has_aux=True)
    return y, load, *pullback(cotangent)
  for name in names:
    out = value_and_gradients(given[name], given['cotangent'], *arrays)
    np.savez(f'{folder}/{text} {name}.npz', *out)
"""


def routings() -> dict[str, np.ndarray]:
  """int32 [N, T, K] by name."""
  rng = np.random.default_rng(0)
  uneven = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(ROWS * TOKENS)])
  groups = [np.concatenate([(2 * g, 2 * g + 1) for g in rng.permutation(4)[:2]]) for _ in uneven]
  two_groups = np.stack([rng.permutation(picks)[:TOP_K] for picks in groups])
  one_row = np.arange(ROWS * TOKENS)[:, None] // TOKENS == 3
  routes = {
    'random': uneven,
    'every pair to one expert': np.full(uneven.shape, 5),
    'all devices but one get nothing': uneven % 2 + 6,
    'one device has all tokens': np.where(one_row, uneven, NOBODY),
    'one device has no token': np.where(one_row, NOBODY, uneven),
    'no token at all': np.full(uneven.shape, NOBODY),
    'two groups': two_groups,
    'two groups, one device has all tokens': np.where(one_row, two_groups, NOBODY),
  }
  return {name: a.reshape(ROWS, TOKENS, TOP_K).astype(np.int32) for name, a in routes.items()}


ROUTINGS = routings()
WITHIN = ('every pair to one expert', 'all devices but one get nothing', 'no token at all', 'two groups',
          'two groups, one device has all tokens')
CASES = [(name, mesh) for mesh in MESHES for name in ROUTINGS] + [(name, mesh) for mesh in LIMITED for name in WITHIN]


@pytest.fixture(scope='module')
def given():
  rng = np.random.default_rng(1)
  shapes = dict(x=(ROWS, TOKENS, WIDTH), gate=(ROWS, TOKENS, TOP_K), w_gate=(EXPERTS, WIDTH, HIDDEN),
                w_up=(EXPERTS, WIDTH, HIDDEN), w_down=(EXPERTS, HIDDEN, WIDTH), cotangent=(ROWS, TOKENS, WIDTH))
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope='module')
def on_mesh(given, tmp_path_factory):
  """(mesh, routing) -> y, load and the gradients by x, gate and the three weights."""
  folder = tmp_path_factory.mktemp('experts')
  np.savez(folder / 'given.npz', **given, **ROUTINGS)
  runs.finish(runs.start_python(ON_EACH, json.dumps(list(ROUTINGS)), json.dumps(MESHES + LIMITED), folder,
                                devices=8))
  return lambda mesh, name: list(np.load(folder / f'{mesh} {name}.npz').values())


@pytest.mark.parametrize('name, mesh', CASES)
def test_every_mesh_gives_the_dense_sum_and_all_its_gradients(name, mesh, given, on_mesh):
  picked = ROUTINGS[name].reshape(-1, TOP_K)

  def dense(x, gate, *weights):
    flat = x.reshape(-1, WIDTH), picked, gate.reshape(-1, TOP_K)
    return moe.experts(*flat, *weights, 'dense').reshape(x.shape)
  y, pullback = jax.vjp(dense, *(jnp.asarray(given[k]) for k in ('x', 'gate', 'w_gate', 'w_up', 'w_down')))
  got_y, load, *gradients = on_mesh(mesh, name)
  np.testing.assert_array_equal(load, np.bincount(picked.reshape(-1), minlength=EXPERTS + 1)[:-1])
  for got, wanted in zip((got_y, *gradients), (y, *pullback(given['cotangent'])), strict=True):
    # float32: sums over up to 144 pairs in another order, relative to the largest entry.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * max(np.abs(wanted).max(), 1e-3))


@pytest.mark.parametrize('mesh', LIMITED)
def test_a_token_that_goes_further_than_its_router_may_send_it_is_not_dropped_in_silence(mesh, on_mesh):
  experts = EXPERTS // (4 if 'tensor' in mesh else 2)
  far = np.array([len({*picks}) for picks in (ROUTINGS['random'] // experts).reshape(-1, TOP_K).tolist()]) > 2
  y, *_ = on_mesh(mesh, 'random')
  np.testing.assert_array_equal(np.isnan(y.reshape(-1, WIDTH)).any(1), far)
  assert far.any() == ('tensor' in mesh)  # of two devices all are in reach


def test_rounds_send_every_pair_once_and_never_more_than_a_buffer_holds():
  rng = np.random.default_rng(2)
  counts = rng.integers(0, 40, (4, 8)) * rng.integers(0, 2, (4, 8))  # of 4 devices with 2 experts each
  traffic, capacity = expert_parallel.count_traffic(jnp.asarray(counts)), 24
  to = counts.reshape(4, 4, 2).sum(-1)
  np.testing.assert_array_equal(traffic.to_SxP, to)
  total, rounds = np.zeros_like(to), -(-to.sum(0).max() // capacity)
  assert rounds > 2
  for i in range(rounds):
    skipped, sent = (np.asarray(a) for a in expert_parallel.window(traffic, i * capacity, capacity))
    np.testing.assert_array_equal(skipped, total)
    assert (sent >= 0).all() and (sent.sum(0) <= capacity).all()
    total += sent
  np.testing.assert_array_equal(total, to)
