"""Shared by the tests of tpu_scripts/: a checkout, a stand-in for gcloud, and two folders that play a slice's hosts.

The stand-in writes down its arguments, keeps the state of one queued resource and, for ssh and scp, acts on the
folders: the real remote shell lines are executed there by bash. The hosts' Python and pip are stand-ins too.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = REPO / 'tpu_scripts'
TARGET = ('--name=my-tpu', '--zone=us-central2-b', '--project=my-project')
HOSTS = ('host0', 'host1')

# All that the scripts may call. PATH holds these alone: a real gcloud of this machine, perhaps one that is
# logged in, must be out of reach whatever a script does.
TOOLS = (
  'awk basename bash cat comm date dirname env flock git gzip hostname ln mkdir mktemp mv readlink rm setsid '
  'sleep sort tail tar tr true wc'
).split()

GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
root = pathlib.Path({root!r})
argv = sys.argv[1:]
with open(root / 'gcloud.jsonl', 'a') as record:
  print(json.dumps(argv), file=record)
flags = dict(word[2:].partition('=')[::2] for word in argv if word.startswith('--'))
plain = [word for word in argv if not word.startswith('--')]
status = 0
# What Google Cloud would hold: the states of the queued resource and of its node; `next`: of one look after another.
cloud_path = root / 'cloud.json'
cloud = json.loads(cloud_path.read_text()) if cloud_path.exists() else {{'queued': None, 'node': None, 'next': []}}
if 'queued-resources' in plain or plain[3] in ('describe', 'delete'):
  kind = 'queued' if 'queued-resources' in plain else 'node'
  verb = plain[3]
  if verb == 'create':
    if cloud['queued']:
      sys.exit('ALREADY_EXISTS')
    cloud |= {{'queued': 'WAITING_FOR_RESOURCES', 'node': None, 'next': ['PROVISIONING', 'ACTIVE']}}
  elif cloud[kind] is None:
    sys.exit('ERROR: (gcloud) NOT_FOUND: Resource was not found')
  elif verb == 'delete':
    cloud |= {{'queued': None, 'node': None, 'next': []}}
    for host in {hosts!r}:  # a new TPU VM has a new disk
      shutil.rmtree(root / host)
      (root / host).mkdir()
  else:
    print(cloud[kind])
    if kind == 'queued' and cloud['next']:
      cloud['queued'] = cloud['next'].pop(0)
      cloud['node'] = 'READY' if cloud['queued'] == 'ACTIVE' else None
  cloud_path.write_text(json.dumps(cloud))
  sys.exit()
for host in {hosts!r} if flags['worker'] == 'all' else ['host' + flags['worker']]:
  home = root / host
  if plain[3] == 'scp':
    of_host = [word.partition(':') for word in plain[4:6]]
    here, there = (home / name if colon else side for side, colon, name in of_host)
    shutil.copy(here, there)
  else:
    env = dict(os.environ, HOME=str(home), PATH=str(root / 'tools'))
    status |= subprocess.run(['bash', '-c', flags['command']], cwd=home, env=env).returncode
sys.exit(status)
"""

# The Python of a host's virtual environment: notes what it was asked for; as moe_rl.main it may stay or fail.
HOST_PYTHON = """#!{python}
import json, os, pathlib, sys, time
argv = sys.argv[1:]
with open(pathlib.Path.home() / 'python.jsonl', 'a') as record:
  print(json.dumps(argv), file=record)
if '--stay' in argv:
  time.sleep(120)
if '--fail' in argv:
  sys.exit('config.steps must be positive')
"""

# The Python that makes the environment: real, but for `-m venv`, which puts the one above where it belongs.
SYSTEM_PYTHON = """#!{python}
import os, pathlib, shutil, sys
if sys.argv[1:3] == ['-m', 'venv']:
  folder = pathlib.Path(sys.argv[-1]) / 'bin'
  folder.mkdir(parents=True)
  shutil.copy({host_python!r}, folder / 'python')
else:
  os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


class Slice:
  """A checkout with tpu_scripts/, two host homes, and the stand-ins; every path is under `root`."""

  def __init__(self, root: Path):
    self.root = root
    self.checkout = root / 'checkout'
    self.system_python = root / 'system_python'
    host_python = root / 'host_python'
    self.tools = root / 'tools'
    self.tools.mkdir()
    for tool in TOOLS:
      (self.tools / tool).symlink_to(shutil.which(tool))
    self.path = f'{root / "bin"}:{self.tools}'
    (root / 'bin').mkdir()
    for path, text in (
      (root / 'bin' / 'gcloud', GCLOUD.format(python=sys.executable, root=str(root), hosts=HOSTS)),
      (host_python, HOST_PYTHON.format(python=sys.executable)),
      (self.system_python, SYSTEM_PYTHON.format(python=sys.executable, host_python=str(host_python))),
    ):
      path.write_text(text)
      path.chmod(0o755)
    for host in HOSTS:
      (root / host).mkdir()
    shutil.copytree(SCRIPTS, self.checkout / 'tpu_scripts')
    (self.checkout / 'setup.py').write_text('# a package\n')
    (self.checkout / 'with space.txt').write_text('one\n')
    self.git('init', '--quiet')
    self.git('add', '.')
    self.git('-c', 'user.name=t', '-c', 'user.email=t@t', 'commit', '--quiet', '-m', 'tree')

  def git(self, *args: str) -> None:
    subprocess.run(['git', *args], cwd=self.checkout, check=True)

  def call(self, script: str, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs tpu_scripts/`script` with the stand-in gcloud first on PATH; output as text, errors not raised."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith('TPU_')}
    return subprocess.run(
      [self.checkout / 'tpu_scripts' / script, *args],
      env={**clean, 'PATH': self.path, **(env or {})},
      capture_output=True,
      text=True,
      timeout=120,
      stdin=subprocess.DEVNULL,
    )

  def install(self, *args: str) -> subprocess.CompletedProcess:
    return self.call('install.sh', *TARGET, f'--python={self.system_python}', *args)

  def run(self, *args: str, watch: int = 10, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return self.call('run.sh', *TARGET, f'--watch={watch}', *options, '--', *args)

  def gcloud_calls(self) -> list[list[str]]:
    return read_lines(self.root / 'gcloud.jsonl')

  def main_calls(self, host: str) -> list[list[str]]:
    """The argument lists with which moe_rl.main was started on a host, oldest first."""
    return [
      argv[2:] for argv in read_lines(self.root / host / 'python.jsonl') if argv[:2] == ['-m', 'moe_rl.main']
    ]

  def cloud(self, **changes) -> dict:
    """What the stand-in for Google Cloud holds, after changing it."""
    path = self.root / 'cloud.json'
    held = json.loads(path.read_text()) if path.exists() else {'queued': None, 'node': None, 'next': []}
    path.write_text(json.dumps(held | changes))
    return held | changes

  def pid(self, host: str) -> int:
    return int((self.root / host / 'moe_rl_logs' / 'run.pid').read_text())

  def end_all_runs(self) -> None:
    for host in HOSTS:
      if (self.root / host / 'moe_rl_logs' / 'run.pid').exists() and is_alive(self.pid(host)):
        os.kill(self.pid(host), signal.SIGKILL)


def read_lines(path: Path) -> list:
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_alive(pid: int) -> bool:
  """Whether the process runs; one that has ended but was not reaped yet does not."""
  try:
    return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def wait_until(condition, seconds: float = 10.0) -> None:
  """Polls; a killed process takes a moment to disappear. Fails after `seconds`."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, f'not so after {seconds} s'
    time.sleep(0.02)


def tpu_slice(tmp_path):
  """The body of a fixture: a `Slice`; its runs are ended afterwards."""
  if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
    pytest.skip(f'not on this machine: {", ".join(missing)}')
  made = Slice(tmp_path)
  yield made
  made.end_all_runs()
