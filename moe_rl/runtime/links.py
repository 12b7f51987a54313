"""Connections between the hosts of a run, kept beside JAX's own: who has not come, and who is gone, by name.

JAX ends a process with a stack trace when another is missing or lost, and does not say which. Here process 0 listens on
the coordinator's port until all have come, then JAX takes the port over; the connections stay open. The kernel closes
them when a process dies, however it does; one that hangs, or whose machine is gone, sends no more signs of life.
"""

import atexit
import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
import time

BEAT_S, SILENT_S = 5, 40  # between two signs of life; without one for so long a process counts as lost
BEAT = b'\0'
DONE = b'.'  # a process that ends its run regularly says so first
VERDICT_S = 3.0

_links: dict[int, socket.socket] = {}  # by process at the other end
_names: list[str] = []  # of all processes, by number
_own = 0
_told = threading.Lock()


def meet(coordinator: str, processes: int, process: int, wait_s: float):
  """Waits until all processes have come to the coordinator. Raises ValueError naming those that have not in wait_s."""
  global _own
  _own = process
  deadline = time.monotonic() + wait_s
  address, _, port = coordinator.rpartition(':')
  if process == 0:
    _receive_all(coordinator, int(port), processes, deadline, wait_s)
  else:
    _go_to(coordinator, (address.strip('[]'), int(port)), processes, process, deadline, wait_s)


def _receive_all(coordinator: str, port: int, processes: int, deadline: float, wait_s: float):
  listener = socket.socket()
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind(('', port))
  except OSError as e:
    raise ValueError(f'--coordinator={coordinator}: port {port} of this host cannot be taken ({e.strerror}): end what '
                     'holds it, or give another to all hosts') from e
  listener.listen(processes)
  names, why = {0: socket.gethostname()}, ''
  with listener:
    while len(names) < processes and not why:
      listener.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        peer, place = listener.accept()
      except TimeoutError:
        missing = ', '.join(str(i) for i in range(processes) if i not in names)
        came = ', '.join(f'{i} ({name})' for i, name in sorted(names.items()))
        why = (f'process {missing} of {processes} did not come to {coordinator} within {wait_s:g} s; here are {came}. '
               'See whether it was started and reaches that address, or wait longer by --wait')
        break
      hello = _read_line(peer, 5.0)
      if not hello:
        peer.close()  # a stranger: a port scan, a health check
      elif hello['processes'] != processes or hello['process'] in names:
        why = (f'process {hello["process"]} of {hello["processes"]} came from {hello["name"]} ({place[0]}), where '
               f'{processes} processes are expected, each once: start all with the same --processes')
        _send(peer, {'why': why})
      else:
        names[hello['process']] = f'{hello["name"]}, {place[0]}'
        _links[hello['process']] = peer
  for peer in _links.values():
    _send(peer, {'why': why} if why else {'names': [names[i] for i in range(processes)]})
  if why:
    close()
    raise ValueError(why)
  _names[:] = [names[i] for i in range(processes)]


def _go_to(coordinator: str, address: tuple[str, int], processes: int, process: int, deadline: float, wait_s: float):
  answer, last = None, 'no answer'
  while answer is None and time.monotonic() < deadline:
    try:
      peer = socket.create_connection(address, timeout=max(min(5.0, deadline - time.monotonic()), 0.01))
      if peer.getsockname() == peer.getpeername():  # a port of the local range may connect to itself
        peer.close()
        raise ConnectionRefusedError(0, 'nobody listens')
      _send(peer, {'process': process, 'processes': processes, 'name': socket.gethostname()})
      answer = _read_line(peer, max(deadline - time.monotonic(), 0) + 5.0)  # process 0 tells who is missing
      if answer is None:
        peer.close()
        time.sleep(0.2)
    except OSError as e:
      last = e.strerror or str(e) or last
      time.sleep(0.2)
  if answer is None:
    raise ValueError(f'process 0 of {processes} was not to be reached at {coordinator} within {wait_s:g} s ({last}), '
                     f'as seen from process {process} ({socket.gethostname()}): see whether it was started there and '
                     'the address is right, or wait longer by --wait')
  if 'why' in answer:
    peer.close()
    raise ValueError(answer['why'])
  _links[0], _names[:] = peer, answer['names']


def watch():
  """From here on, the loss of another process ends this one with a message."""
  for link in _links.values():
    link.settimeout(None)
  # JAX's client calls abort() as soon as process 0 is gone. As the handler, sleep(SIGABRT = 6) holds that up for 6 s,
  # in which the thread below says who it was; the abort then goes on.
  libc = ctypes.CDLL(None)
  libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
  for work in (_watch, _beat):
    threading.Thread(target=work, daemon=True, name='hosts').start()
  atexit.register(_say_done)


def _beat():
  while True:
    time.sleep(BEAT_S)
    for link in list(_links.values()):
      _send_bytes(link, BEAT)


def _watch():
  open_links, now = dict(_links), time.monotonic()
  heard = dict.fromkeys(open_links, now)
  while open_links:
    ready, _, _ = select.select(list(open_links.values()), [], [], BEAT_S)
    before, now = now, time.monotonic()
    if now - before > 2 * BEAT_S:  # it is this process that was held up
      heard = dict.fromkeys(open_links, now)
    for process, link in list(open_links.items()):
      if link in ready:
        heard[process] = now
        _read(process, link, open_links)
      elif now - heard[process] > SILENT_S:
        _end(f'process {process} ({_names[process]}) has given no sign of life for {SILENT_S} s')


def _read(process: int, link: socket.socket, open_links: dict):
  """What another process has to say."""
  try:
    data = link.recv(65536)
  except OSError:
    data = b''
  got = data.replace(BEAT, b'')
  if got.startswith(DONE):
    del open_links[process]
  elif got:  # process 0 passes on whom it lost
    _end(got.decode().strip())
  elif not data:
    _end(f'process {process} ({_names[process]}) is gone')


def _end(what: str):
  """Tells it to the other processes and to the person, then ends the process."""
  with _told:
    if _own == 0:
      for link in _links.values():
        _send_bytes(link, what.encode() + b'\n')
    os.write(2, (f'\nerror: {what}: process {_own} stops too. Its own log says why it ended; start the same command on '
                 'all hosts again to go on from the newest checkpoint\n').encode())
    os._exit(1)


def wait_for_verdict():
  """Gives the watching thread time to end the process, where an error may have come of a loss that it is reading."""
  time.sleep(VERDICT_S)


def connected() -> bool:
  return bool(_links)


def leave(status: int):
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def close():
  for link in _links.values():
    link.close()
  _links.clear()


def _say_done():
  if not hasattr(sys, 'last_value'):  # an error that ends the program is no regular end
    for link in _links.values():
      _send_bytes(link, DONE)


def _send(link: socket.socket, record: dict):
  _send_bytes(link, json.dumps(record).encode() + b'\n')


def _send_bytes(link: socket.socket, data: bytes):
  try:
    link.sendall(data)
  except OSError:  # gone: whoever waits for it finds out by reading
    pass


def _read_line(link: socket.socket, seconds: float) -> dict | None:
  """A JSON object, or None for anything else within the time."""
  deadline, data = time.monotonic() + seconds, b''
  try:
    while not data.endswith(b'\n'):
      link.settimeout(max(deadline - time.monotonic(), 0.01))
      part = link.recv(65536)
      if not part:
        return None
      data += part
    got = json.loads(data)
    return got if isinstance(got, dict) else None
  except (OSError, ValueError):
    return None
