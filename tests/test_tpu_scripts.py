"""install.sh and run.sh: what they run on the hosts, what they refuse, what they print; and what all scripts share."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tpu import HOSTS, REPO, SCRIPTS, TARGET, is_alive, read_lines, tpu_slice, wait_until

tpu = pytest.fixture(tpu_slice)


@pytest.mark.parametrize(
  ('script', 'rest', 'words'),
  [
    ('install.sh', (), ['scp', 'ssh']),
    ('run.sh', ('--', '--config=a b'), ['ssh', 'ssh']),
    ('run.sh', ('--force', '--', '--config=a b'), ['ssh', 'ssh']),
  ],
)
def test_dry_run_prints_each_gcloud_command_and_runs_none(tpu, script, rest, words):
  # Without any gcloud on PATH either: one can read what would happen before installing it.
  done = tpu.call(script, *TARGET, '--dry-run', *rest, env={'PATH': str(tpu.tools)})
  assert done.returncode == 0, done.stderr
  shown = [line for line in done.stdout.splitlines() if line.startswith('+ gcloud compute tpus tpu-vm ')]
  assert [line.split()[5] for line in shown] == words
  for line in shown:
    for word in ('my-tpu', '--zone=us-central2-b', '--project=my-project', '--worker=all'):
      assert word in line
  assert tpu.gcloud_calls() == []
  assert [path for host in HOSTS for path in (tpu.root / host).iterdir()] == []


def test_what_a_dry_run_prints_is_what_runs(tpu):
  tpu.install()
  for options in ((), ('--force',)):
    before = len(tpu.gcloud_calls())
    argument = '--config.prompt=it\'s "two  words"; $HOME `id` \\ *\nnext'
    shown = tpu.run(argument, options=('--dry-run', *options)).stdout
    assert len(tpu.gcloud_calls()) == before
    tpu.run(argument, options=options)
    ran = tpu.gcloud_calls()[before:]
    # A shell reads the printed lines back into the very words that gcloud got.
    printed = shown[shown.index('+ gcloud'):shown.index('\nFollow host 0:')]
    text = printed.replace('+ gcloud', f'{sys.executable} -c "$dump"')
    dump = 'import json, sys; print(json.dumps(sys.argv[1:]))'
    read = subprocess.run(
      ['bash', '-c', text], env={'dump': dump}, capture_output=True, text=True, check=True
    )
    assert [json.loads(line) for line in read.stdout.splitlines()] == ran


@pytest.mark.parametrize('script', ['install.sh', 'run.sh'])
@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (
      ('--name=my-tpu', '--project=my-project'),
      'no TPU zone given: pass --zone=us-central2-b or set TPU_ZONE',
    ),
    (
      ('--zone=us-central2-b', '--project=my-project'),
      'no TPU name given: pass --name=my-tpu or set TPU_NAME',
    ),
    (
      ('--name=my-tpu', '--zone=us-central2-b'),
      'no TPU project given: pass --project=my-project or set TPU_PROJECT',
    ),
    (
      (*TARGET, '--zone=us-central2'),
      "'us-central2' is no TPU zone: --zone (or TPU_ZONE) should look like us-central2-b",
    ),
    ((*TARGET, '--name=My TPU'), "'My TPU' is no TPU name"),
    ((*TARGET, '--zone'), '--zone needs a value: --zone=VALUE'),
    ((*TARGET, '--zome=x'), "unknown argument '--zome=x'"),
  ],
)
def test_a_wrong_target_is_named_with_the_remedy_and_nothing_runs(tpu, script, args, message):
  done = tpu.call(script, *args)
  assert done.returncode == 2
  assert f'{script}: {message}' in done.stderr
  assert tpu.gcloud_calls() == []


def test_target_may_come_from_the_environment_and_a_flag_wins(tpu):
  env = {'TPU_NAME': 'of-env', 'TPU_ZONE': 'us-east5-a', 'TPU_PROJECT': 'env-project'}
  done = tpu.call('run.sh', '--dry-run', '--name', 'of-flag', '--', '--config=c.py', env=env)
  assert done.returncode == 0, done.stderr
  assert 'ssh of-flag --zone=us-east5-a --project=env-project' in done.stdout


@pytest.mark.parametrize('script', ['install.sh', 'run.sh'])
def test_help_says_what_it_starts_and_what_it_costs(tpu, script):
  done = tpu.call(script, '--help')
  assert done.returncode == 0
  for word in ('Starts:', 'Costs:', 'billed', 'Usage:', '--dry-run', 'TPU_NAME'):
    assert word in done.stdout
  assert 'set -euo' not in done.stdout


def test_run_without_arguments_for_main_says_where_they_go(tpu):
  done = tpu.call('run.sh', *TARGET)
  assert done.returncode == 2
  assert 'after --, such as -- --config=experiments/r1_zero.py' in done.stderr


def test_missing_gcloud_is_named(tpu):
  done = tpu.call('run.sh', *TARGET, '--', '--config=c.py', env={'PATH': str(tpu.tools)})
  assert done.returncode == 2
  assert 'gcloud is not on PATH' in done.stderr


def test_install_puts_the_working_tree_on_every_host_and_updates_it_in_place(tpu):
  (tpu.checkout / '.gitignore').write_text('*.log\n')
  (tpu.checkout / 'ignored.log').write_text('no\n')
  (tpu.checkout / 'untracked.py').write_text('new\n')
  done = tpu.install()
  assert done.returncode == 0, done.stderr
  for host in HOSTS:
    tree = tpu.root / host / 'moe_rl'
    assert (tree / 'with space.txt').read_text() == 'one\n'
    assert (tree / 'untracked.py').exists()
    assert not (tree / 'ignored.log').exists()
    assert os.access(tree / 'tpu_scripts' / 'on_host.sh', os.X_OK)
    assert not (tpu.root / host / 'moe_rl_tree.tar.gz').exists()
    (tree / 'runs').mkdir()
    (tree / 'runs' / 'checkpoint').write_text('hours of work\n')
    assert ['-m', 'pip', 'install'] in [argv[:3] for argv in read_lines(tpu.root / host / 'python.jsonl')]

  (tpu.checkout / 'with space.txt').unlink()  # still tracked, no longer there
  (tpu.checkout / 'untracked.py').write_text('newer\n')
  again = tpu.install()
  assert again.returncode == 0, again.stderr
  for host in HOSTS:
    tree = tpu.root / host / 'moe_rl'
    assert not (tree / 'with space.txt').exists()
    assert (tree / 'untracked.py').read_text() == 'newer\n'
    assert (tree / 'runs' / 'checkpoint').read_text() == 'hours of work\n'


def test_install_names_an_interpreter_that_will_not_do(tpu):
  done = tpu.call('install.sh', *TARGET, '--python=/nonexistent/python')
  assert done.returncode != 0
  assert '/nonexistent/python is no Python >= 3.11 with venv on this host' in done.stderr
  assert 'not installed on every host' in done.stderr


def test_arguments_reach_main_on_every_host_intact(tpu):
  tpu.install()
  arguments = [
    '--config=experiments/r1_zero.py:tiny',
    '--config.prompt=it\'s "two  words"; $HOME `id` $(id) \\ * ~ !! & | > x',
    '--config.note=first line\nsecond line\n',
    '',
    '--workdir=gs://bucket/a run',
    '--',
    '--force',
  ]
  done = tpu.run(*arguments)
  assert done.returncode == 0, done.stderr + done.stdout
  for host in HOSTS:
    assert tpu.main_calls(host) == [arguments]


def test_run_prints_how_to_follow_and_to_stop_and_the_stop_command_works(tpu):
  tpu.install()
  done = tpu.run('--stay', watch=1)
  assert done.returncode == 0, done.stderr
  assert [is_alive(tpu.pid(host)) for host in HOSTS] == [True, True]
  printed = dict(line.split(':', 1) for line in done.stdout.splitlines() if 'host' in line and ': ' in line)
  assert 'moe_rl_logs/latest.log' in printed['Follow host 0']
  subprocess.run(
    ['/bin/sh', '-c', printed['Stop all hosts']], check=True, env={**os.environ, 'PATH': tpu.path}
  )
  assert [is_alive(tpu.pid(host)) for host in HOSTS] == [False, False]


def test_second_run_refuses_on_all_hosts_while_one_is_alive_on_any(tpu):
  tpu.install()
  assert tpu.run('--stay', watch=1).returncode == 0
  os.kill(tpu.pid('host0'), signal.SIGKILL)  # only host1 goes on; host0 could start
  wait_until(lambda: not is_alive(tpu.pid('host0')))
  pid = tpu.pid('host1')
  second = tpu.run('--second')
  assert second.returncode == 2
  assert f'a run is alive (pid {pid})' in second.stderr
  assert 'nothing was started' in second.stderr and '--force' in second.stderr
  assert [tpu.main_calls(host) for host in HOSTS] == [[['--stay']], [['--stay']]]

  install = tpu.install()
  assert install.returncode != 0
  assert 'nothing was installed' in install.stderr

  forced = tpu.run('--second', options=('--force',))
  assert forced.returncode == 0, forced.stderr
  assert not is_alive(pid)
  assert [tpu.main_calls(host)[1:] for host in HOSTS] == [[['--second']], [['--second']]]


def test_a_run_can_follow_one_that_was_killed(tpu):
  tpu.install()
  assert tpu.run('--stay', watch=1).returncode == 0
  tpu.end_all_runs()
  wait_until(lambda: not any(is_alive(tpu.pid(host)) for host in HOSTS))
  assert tpu.run('--next').returncode == 0
  assert tpu.main_calls('host0') == [['--stay'], ['--next']]


def test_a_run_that_ends_at_once_shows_its_log_and_fails(tpu):
  tpu.install()
  done = tpu.run('--fail')
  assert done.returncode == 2
  assert 'ended within 10 s with exit status 1' in done.stdout
  assert 'config.steps must be positive' in done.stdout


def test_run_before_install_says_so(tpu):
  (tpu.root / 'host0' / 'moe_rl').mkdir()
  shutil.copytree(SCRIPTS, tpu.root / 'host0' / 'moe_rl' / 'tpu_scripts')
  done = tpu.run('--config=c.py')
  assert done.returncode == 2
  assert 'moe_rl is not installed here: run tpu_scripts/install.sh first' in done.stderr


def test_shell_scripts_pass_shellcheck():
  # Beside the interpreter first: a virtual environment need not be activated.
  places = os.pathsep.join((str(Path(sys.executable).parent), os.environ['PATH']))
  binary = shutil.which('shellcheck', path=places)
  if binary is None:
    pytest.skip("no shellcheck on PATH: pip install -e '.[test]' brings one")
  scripts = [*sorted(SCRIPTS.glob('*.sh')), REPO / '.ci' / 'run']
  done = subprocess.run([binary, '--external-sources', *scripts], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_every_tpu_script_opens_with_what_it_starts_and_costs():
  for path in sorted(SCRIPTS.glob('*.sh')):
    head = path.read_text().split('\nset -', 1)[0].splitlines()[:8]
    text = ' '.join(head).lower()
    assert 'start' in text and 'cost' in text, path.name
