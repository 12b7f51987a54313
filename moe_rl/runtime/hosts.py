"""Several hosts, one program: who takes part, how they find each other, and what happens when one is lost.

One process a host. Rows of a batch are dealt out: process i of n has rows i, i + n, i + 2n, …, so that the k-th part of
every process together is the k-th part of the whole batch. With one process all functions of arrays do nothing.
"""

import dataclasses
import json
import os
import urllib.request
import zlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_rl.runtime import links
from moe_rl.runtime import mesh as meshes

PORT = 8476  # of process 0 on a TPU pod, where no flag says another
HEARTBEAT_S = 50  # JAX's own, which names nobody: later than `links` tells
METADATA = 'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'


@dataclasses.dataclass(frozen=True)
class Place:
  """coordinator: HOST:PORT of process 0; processes: how many; process: which of them this is, from 0."""

  coordinator: str
  processes: int
  process: int


def from_flags(coordinator: str, processes: int, process: int) -> Place | None:
  """The place that flags name; None where none is given (all at '', 0, -1). Raises ValueError on a partial set."""
  if (coordinator, processes, process) == ('', 0, -1):
    return None
  if not coordinator or processes < 1 or process < 0:
    raise ValueError(f'--coordinator={coordinator} --processes={processes} --process={process}: give all three, '
                     'such as --coordinator=10.0.0.1:8476 --processes=4 --process=0, or none')
  name, _, port = coordinator.rpartition(':')
  if not name or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(f'--coordinator={coordinator}: give HOST:PORT of process 0, such as 10.0.0.1:{PORT}')
  if process >= processes:
    raise ValueError(f'--process={process} of --processes={processes}: they count from 0, so at most {processes - 1}')
  return Place(coordinator, processes, process)


def from_tpu(environment: Mapping[str, str] = os.environ, metadata=None) -> Place | None:
  """The place of this host in a TPU slice, or in a set of slices; None on one host and where there is no TPU.

  environment: TPU_WORKER_HOSTNAMES and TPU_WORKER_ID where something sets them; otherwise, on a machine with TPU
  chips, metadata: (name) -> text, by default that of the VM. MEGASCALE_* tell of further slices.
  """
  if environment.get('JAX_PLATFORMS', 'tpu').split(',')[0] not in ('', 'tpu'):
    return None
  names = [name for name in environment.get('TPU_WORKER_HOSTNAMES', '').split(',') if name]
  worker = environment.get('TPU_WORKER_ID', '')
  if not (names and worker.isdigit()):
    if not any(map(os.path.exists, ('/dev/accel0', '/dev/vfio/0'))) and metadata is None:
      return None
    metadata = metadata or read_metadata
    # An entry a worker: NAME:PORT:ADDRESS.
    names = [entry.split(':')[2] for entry in metadata('worker-network-endpoints').split(',') if entry.count(':') >= 2]
    worker = metadata('agent-worker-number') or '0'
  slices, slice_index = (int(environment.get(f'MEGASCALE_{key}', default)) for key, default in
                         (('NUM_SLICES', '1'), ('SLICE_ID', '0')))
  if len(names) * slices <= 1:
    return None
  first = environment.get('MEGASCALE_COORDINATOR_ADDRESS', '').split(':')[0] if slices > 1 else names[0]
  return Place(f'{first}:{PORT}', len(names) * slices, slice_index * len(names) + int(worker))


def read_metadata(name: str) -> str:
  """An attribute of the Google Cloud VM that this is, '' where there is none or nobody answers within 5 s."""
  request = urllib.request.Request(METADATA + name, headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except OSError:
    return ''


def connect(place: Place | None, wait_s: float = 300):
  """Joins the other processes; to be called before anything touches a device. Does nothing for one process.

  Raises ValueError naming the processes that did not come within wait_s. From then on, a process that is lost ends the
  others with a message, also from within a collective that would wait for it.
  """
  if place is None or place.processes == 1 or jax.distributed.is_initialized():
    return
  links.meet(place.coordinator, place.processes, place.process, wait_s)
  # The rest of the time is for JAX's own meeting, of processes that are known to be there.
  jax.distributed.initialize(place.coordinator, place.processes, place.process,
                             initialization_timeout=max(60, int(wait_s)), heartbeat_timeout_seconds=HEARTBEAT_S)
  links.watch()


def leave(status: int):
  """Ends this process with `status` if others are connected, telling them by that; else returns.

  A regular exit would first wait minutes for hosts that wait for this one.
  """
  if links.connected():
    links.leave(status)


def connected() -> bool:
  """Whether other processes take part."""
  return links.connected()


def index() -> int:
  return jax.process_index()


def count() -> int:
  return jax.process_count()


def shard() -> tuple[int, int]:
  """(this process, how many)."""
  return jax.process_index(), jax.process_count()


def mine(whole):
  """This process's rows of what all have alike; a list or an array."""
  return whole[index()::count()]


def merge(own: list) -> list:
  """JSON values of this process's rows -> those of all, in the order that one process would have them."""
  every = gather(own)
  return [every[i % count()][i // count()] for i in range(sum(map(len, every)))]


def split(tree, sharding):
  """Arrays that all processes have alike -> the same over all devices."""
  if count() == 1:
    return tree
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i, x=x: x[i]), tree)


def spread(tree, like, leading: int = 0):
  """Each process's rows as arrays over all devices. like: any tree of arrays on the mesh; rows are axis `leading`."""
  if count() == 1:
    return tree
  sharding = meshes.rows(jax.tree.leaves(like)[0].sharding.mesh, leading)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def own_rows(tree):
  """As numpy arrays: this process's rows of arrays whose first axis is that of `spread`."""
  if count() == 1:
    return jax.device_get(tree)

  def rows(x):
    parts = {s.index[0].start or 0: s.data for s in x.addressable_shards}  # copies over other axes come once
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
  return jax.tree.map(rows, tree)


def gather_rows(tree):
  """Numpy arrays of each process's rows -> those of all, in the order that one process would have them."""
  if count() == 1:
    return tree
  leaves, structure = jax.tree.flatten(jax.tree.map(np.ascontiguousarray, tree))
  # As bytes: JAX would make 32-bit numbers of 64-bit ones.
  all_bytes = _all_gather(np.concatenate([x.reshape(-1).view(np.uint8) for x in leaves]))
  out, at = [], 0
  for x in leaves:
    parts = [np.frombuffer(b[at:at + x.nbytes].tobytes(), x.dtype).reshape(x.shape) for b in all_bytes]
    out.append(np.stack(parts, 1).reshape(-1, *x.shape[1:]))
    at += x.nbytes
  return jax.tree.unflatten(structure, out)


def deal(tree, chosen: np.ndarray, parts: int):
  """The chosen of all hosts' rows, dealt out evenly; numpy arrays in and out.

  chosen: int, in the numbers that one process would give the rows; a multiple of parts x processes. The k-th part of
  every process together is the k-th part of chosen. Rows stay where they are as far as that allows.
  """
  if count() == 1:
    return jax.tree.map(lambda x: x[chosen], tree)
  n, home = count(), chosen % count()
  owner = owners(home, n, parts)
  leaving = [chosen[(home == p) & (owner != p)] for p in range(n)]
  width, sent = max(map(len, leaving)), tree
  if width:
    own = leaving[index()] // n
    sent = gather_rows(jax.tree.map(lambda x: x[np.pad(own, (0, width - len(own)))], tree))
  place = {row: n * i + p for p, rows in enumerate(leaving) for i, row in enumerate(rows)}
  kept = chosen[owner == index()]
  return jax.tree.map(lambda x, s: np.stack([x[c // n] if c % n == index() else s[place[c]] for c in kept]), tree, sent)


def owners(home: np.ndarray, processes: int, parts: int) -> np.ndarray:
  """int, like home: who is to have each row, so that each process has as many of every part; as few move as can be.

  home: who has it.
  """
  owner = np.full(len(home), -1)
  for part in np.split(np.arange(len(home)), parts):
    room = np.full(processes, len(part) // processes)
    for row in part:
      if room[home[row]]:
        owner[row] = home[row]
        room[home[row]] -= 1
    owner[part[owner[part] < 0]] = np.repeat(np.arange(processes), room)
  return owner


def checksum(rows: np.ndarray) -> int:
  """CRC-32 of the bytes of all hosts' rows, in the order that one process would have them."""
  crcs = gather_rows(np.array([zlib.crc32(x.tobytes()) for x in rows], np.int64))
  zeros, total = bytes(rows[0].nbytes), 0
  of_zeros = zlib.crc32(zeros)
  for crc in crcs.tolist():  # a CRC is linear over XOR: the sum so far passes over zeros where the row's bytes are
    total = zlib.crc32(zeros, total) ^ of_zeros ^ crc
  return total


def gather(record) -> list:
  """The JSON value of every process, in order."""
  if count() == 1:
    return [record]
  text = json.dumps(record).encode()
  sizes = _all_gather(np.array([len(text)], np.int64).view(np.uint8)).view(np.int64)[:, 0]
  width = 1 << int(sizes.max() - 1).bit_length()  # few widths, as each is a program
  rows = _all_gather(np.frombuffer(text.ljust(width), np.uint8))
  return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def total(counts: dict[str, int]) -> dict[str, int]:
  """Sums by name over all processes, names sorted as the first process that has them gave them."""
  every = gather(counts)
  return {k: sum(c.get(k, 0) for c in every) for k in dict.fromkeys(k for c in every for k in c)}


def whole(tree):
  """Arrays over all hosts' devices -> arrays that each host has whole, in its memory."""
  return tree if count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def _all_gather(data: np.ndarray) -> np.ndarray:
  """uint8 [k] -> uint8 [processes, k]; k alike everywhere."""
  return np.ascontiguousarray(multihost_utils.process_allgather(data))


def first(record):
  """The JSON value of process 0, once all have come here: what it wrote before is there for the others to read."""
  return gather(record)[0]


def settle(error: BaseException):
  """Where an error may have come of another host's loss, waits for that to be told, which ends the process."""
  if links.connected() and (isinstance(error, jax.errors.JaxRuntimeError) or 'Gloo' in str(error)):
    links.wait_for_verdict()
