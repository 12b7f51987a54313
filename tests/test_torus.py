"""Which chip gets which place of the mesh: axes are boxes of the torus, in a run as in a plan."""

import types

import numpy as np
import pytest

from moe_rl.runtime import torus


def chips(*shape: int, cores: int = 1):
  """A slice's devices as jax describes them, in an order of its own."""
  every = [types.SimpleNamespace(coords=(x, y, z), core_on_chip=c) for z in range(shape[2]) for y in range(shape[1])
           for x in range(shape[0]) for c in range(cores)]
  return [every[i] for i in np.random.default_rng(0).permutation(len(every))]


def box(devices) -> tuple[int, ...]:
  """How far a group of chips reaches in each dimension."""
  at = np.array([d.coords for d in devices])
  return tuple(at.max(0) - at.min(0) + 1)


@pytest.mark.parametrize('shape, sizes, experts', [
  ((8, 8, 8), (1, 64, 8, 1), (2, 2, 2)),  # a line of 8 would have a busiest link of twice the load
  ((8, 8, 8), (1, 8, 64, 1), (8, 8, 1)),  # no box of 64 beats a plane of whole rings, which leaves a ring to the rest
  ((4, 4, 1), (1, 4, 4, 1), (2, 2, 1))])
def test_experts_that_exchange_tokens_are_neighbours(shape, sizes, experts):
  devices = chips(*shape)
  mesh = torus.arranged(devices, sizes)
  assert mesh.shape == sizes and {id(d) for d in mesh.flat} == {id(d) for d in devices}
  for group in mesh.reshape(-1, sizes[2]):
    assert sorted(box(group)) == sorted(experts)


def test_a_host_has_neighbouring_rows_of_a_batch():
  mesh = torus.arranged(chips(8, 8, 8), (1, 64, 8, 1))
  for host in mesh.reshape(-1, 4):
    assert box(host) == (2, 2, 1)


def test_no_two_hosts_share_a_row_where_a_host_can_hold_one():
  devices = chips(4, 4, 4)  # a ring of 4 is as fast as 2x2 and goes over two hosts
  for d in devices:
    d.process_index = tuple(np.array(d.coords) // (2, 2, 1))
  mesh = torus.arranged(devices, (1, 4, 4, 4))
  assert all(len({d.process_index for d in row}) == 1 for row in mesh.reshape(-1, 4))
  assert torus.arranged(devices, (1, 2, 4, 8)).shape == (1, 2, 4, 8)  # a row of 8 chips is of two hosts anyway


def test_devices_of_one_chip_stay_together():
  mesh = torus.arranged(chips(2, 2, 1, cores=2), (1, 2, 2, 2))
  pairs = [{d.coords for d in mesh.transpose(order).reshape(-1, 2)[0]} for order in ((0, 1, 2, 3), (0, 2, 3, 1),
                                                                                  (0, 1, 3, 2))]
  assert min(map(len, pairs)) == 1  # along one axis they are neighbours


def test_data_lies_across_slices_and_no_other_axis_does():
  one, two = chips(2, 2, 1), chips(2, 2, 1)  # with the same coordinates
  for i, devices in enumerate((one, two)):
    for d in devices:
      d.slice_index = i
  mesh = torus.arranged([*two, *one], (2, 1, 4, 1))
  assert {d.slice_index for d in mesh[0].flat} == {0} and {d.slice_index for d in mesh[1].flat} == {1}
  with pytest.raises(ValueError, match='config.mesh.data 1 is not a multiple of the 2 slices.* set it to 2'):
    torus.arranged([*one, *two], (1, 1, 8, 1))


def test_what_is_no_box_of_chips_keeps_its_order():
  others = [types.SimpleNamespace(id=i) for i in range(8)]
  assert list(torus.arranged(others, (2, 2, 2, 1)).flat) == others
  corner = chips(2, 2, 1)[:3]
  assert list(torus.arranged(corner, (1, 3, 1, 1)).flat) == corner


def test_rings_close_where_the_wiring_closes_them():
  assert torus.wraps((8, 8, 8)) == (True,) * 3 and torus.wraps((2, 2, 4)) == (False,) * 3
  assert torus.wraps((16, 8, 1)) == (True, False, False) and torus.wraps((16, 16)) == (True, True)
