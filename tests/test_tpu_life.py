"""tpu_scripts/ that make a TPU, look at it, bring it back and delete it; see tpu.py for the stand-in."""

import os
import signal
import subprocess

import pytest
from tpu import HOSTS, TARGET, is_alive, tpu_slice, wait_until

tpu = pytest.fixture(tpu_slice)

SHAPE = ('--type=v5p-8', '--poll=1')
RUN = ('--config=experiments/r1_zero.py', '--workdir=/mnt/runs/a run', '--stay')
CALLS = {  # arguments that would do something, and what gcloud would be asked for
  'create.sh': (SHAPE, ['queued-resources describe', 'queued-resources create']),
  'delete.sh': (('--yes',), ['queued-resources describe', 'queued-resources delete']),
  'logs.sh': ((), ['tpu-vm ssh']),
  'fetch.sh': (('--workdir=runs/r1_zero',), ['tpu-vm ssh', 'tpu-vm scp']),
  'resume.sh': ((*SHAPE, '--', *RUN), [
    'queued-resources describe', 'queued-resources delete', 'queued-resources create', 'tpu-vm scp', 'tpu-vm ssh',
    'tpu-vm ssh', 'tpu-vm ssh'])}


def verbs(tpu) -> list[str]:
  return [' '.join(call[2:4]) for call in tpu.gcloud_calls()]


def resume(tpu, *options: str, run: tuple[str, ...] = RUN) -> subprocess.CompletedProcess:
  return tpu.call('resume.sh', *TARGET, *SHAPE, f'--python={tpu.system_python}', '--watch=1', *options, '--', *run)


@pytest.mark.parametrize('script', CALLS)
def test_dry_run_prints_each_command_and_runs_none(tpu, script):
  args, wanted = CALLS[script]
  done = tpu.call(script, *TARGET, '--dry-run', *args, env={'PATH': str(tpu.tools)})  # without any gcloud
  assert done.returncode == 0, done.stderr
  shown = [line.split() for line in done.stdout.splitlines() if line.startswith('+ gcloud')]
  assert [' '.join(line[4:6]) if line[3] == 'tpus' else line for line in shown] == wanted
  for line in shown:
    assert '--zone=us-central2-b' in line and '--project=my-project' in line
  assert tpu.gcloud_calls() == [] and not (tpu.root / 'cloud.json').exists()


@pytest.mark.parametrize('script', CALLS)
def test_help_says_what_it_starts_and_what_it_costs_an_hour(tpu, script):
  done = tpu.call(script, '--help')
  assert done.returncode == 0
  for word in ('Starts:', 'Costs:', 'hour', 'Usage:', '--dry-run', 'TPU_NAME'):
    assert word in done.stdout, word
  assert 'set -euo' not in done.stdout


@pytest.mark.parametrize('script', ['install.sh', 'run.sh', 'logs.sh', 'fetch.sh', 'delete.sh'])
@pytest.mark.parametrize('type_, cost', [
  ('v5litepod-16', 'exists: on demand about $19.20 an hour ($1.20 a chip-hour, list price'),
  ('tpu7x-8', 'exists: its chips times the price in prices.txt, an hour'),  # no type of theirs, so no price
  ('', 'exists: its chips times the price in prices.txt, an hour')])
def test_what_starts_and_what_the_tpu_goes_on_costing_is_printed(tpu, script, type_, cost):
  args = CALLS[script][0] if script in CALLS else {'install.sh': (), 'run.sh': ('--', *RUN)}[script]
  done = tpu.call(script, *TARGET, '--dry-run', *args, env={'TPU_TYPE': type_})
  assert done.returncode == 0, done.stderr
  line, = [line for line in done.stdout.splitlines() if line.startswith('Starts ')]
  assert cost in line and 'Costs nothing by itself' in line and 'my-tpu is billed' in line


@pytest.mark.parametrize('args, cost', [
  (('--type=v5p-8',), '4 chips, on demand. Costs about $16.80 an hour ($4.20 a chip-hour'),  # 8 cores
  (('--type=v4-32',), '16 chips, on demand. Costs about $51.52 an hour ($3.22 a chip-hour'),
  (('--type=v6e-16',), '16 chips, on demand. Costs about $43.20 an hour ($2.70 a chip-hour'),
  (('--type=v5litepod-16', '--spot'), '16 chips, spot. Costs about $7.68 an hour ($0.48 a chip-hour, estimate')])
def test_the_price_an_hour_is_printed_before_anything_is_requested(tpu, args, cost):
  done = tpu.call('create.sh', *TARGET, *args, '--dry-run')
  assert done.returncode == 0, done.stderr
  assert cost in done.stdout.splitlines()[0]
  assert ('--spot' in done.stdout.splitlines()[2]) == ('--spot' in args)


@pytest.mark.parametrize('script', ['create.sh', 'resume.sh'])
@pytest.mark.parametrize('type_, message', [
  ('', 'no TPU type given: pass --type=v5p-8 or set TPU_TYPE'),
  ('v5e-16', "'v5e-16': Cloud TPU calls this generation v5litepod: --type=v5litepod-16"),
  ('tpu7x-8', "'tpu7x-8': Cloud TPU offers tpu7x through Kubernetes Engine alone"),
  ('v9-8', "'v9-8' is no TPU type known here"), ('v5p-7', 'must be a multiple of 2'), ('v5p', "'v5p' is no TPU type"),
  ('v5p-0', 'after the dash comes a number')])
def test_a_type_that_cannot_be_had_is_refused_with_the_remedy(tpu, script, type_, message):
  done = tpu.call(script, *TARGET, f'--type={type_}', *(('--', *RUN) if script == 'resume.sh' else ()))
  assert done.returncode == 2 and f'{script}: ' in done.stderr and message in done.stderr
  assert len(done.stderr.splitlines()) == 1 and tpu.gcloud_calls() == []


@pytest.mark.parametrize('script, args, message', [
  ('create.sh', ('--poll=0', '--type=v5p-8'), '--poll=0 is no whole number of seconds above 0'),
  ('create.sh', ('--spto',), "unknown argument '--spto'"),
  ('delete.sh', (), 'nothing was deleted: my-tpu and the files on its disks go with --yes'),
  ('logs.sh', ('--worker=x',), "--worker=x is no host number and not 'all'"),
  ('logs.sh', ('--lines=x',), '--lines=x is no whole number'),
  ('fetch.sh', (), 'no run given: pass --workdir=DIR'),
  ('resume.sh', SHAPE, 'nothing to resume: give the arguments of the run after --'),
  ('resume.sh', (*SHAPE, '--', '--config=c.py'), 'the run has no --workdir'),
  ('resume.sh', (*SHAPE, '--', '--workdir=gs://b/r'), 'mount the bucket with gcsfuse')])
def test_bad_input_is_one_message_and_nothing_runs(tpu, script, args, message):
  done = tpu.call(script, *TARGET, *args)
  assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
  assert tpu.gcloud_calls() == []


def test_create_requests_once_and_waits_until_it_is_there(tpu):
  done = tpu.call('create.sh', *TARGET, *SHAPE, '--spot')
  assert done.returncode == 0, done.stderr
  assert tpu.cloud()['queued'] == 'ACTIVE' and 'is WAITING_FOR_RESOURCES; looking again' in done.stdout
  [made] = [call for call in tpu.gcloud_calls() if call[3] == 'create']
  for word in ('my-tpu', '--node-id=my-tpu', '--accelerator-type=v5p-8', '--runtime-version=v2-alpha-tpuv5', '--spot'):
    assert word in made
  again = tpu.call('create.sh', *TARGET, *SHAPE, '--spot')
  assert again.returncode == 0 and 'already and is ACTIVE: nothing new is requested' in again.stdout
  assert verbs(tpu).count('queued-resources create') == 1


def test_create_does_not_take_a_preempted_one_for_its_own(tpu):
  tpu.cloud(queued='SUSPENDED')
  done = tpu.call('create.sh', *TARGET, *SHAPE)
  assert done.returncode == 2 and 'is there but SUSPENDED: tpu_scripts/resume.sh requests it anew' in done.stderr


def test_an_answer_that_is_no_state_stops_everything(tpu):
  (tpu.root / 'bin' / 'gcloud').write_text('#!/bin/sh\necho PERMISSION_DENIED >&2\nexit 1\n')
  for script in ('create.sh', 'delete.sh', 'resume.sh'):
    done = tpu.call(script, *TARGET, *CALLS[script][0])
    assert done.returncode == 2 and 'gcloud could not say how my-tpu is: PERMISSION_DENIED' in done.stderr


def test_delete_deletes_and_finds_nothing_the_second_time(tpu):
  tpu.cloud(queued='ACTIVE', node='READY')
  done = tpu.call('delete.sh', *TARGET, '--yes')
  assert done.returncode == 0 and 'is deleted: nothing is billed any more ($0 an hour)' in done.stdout
  assert tpu.cloud()['queued'] is None
  again = tpu.call('delete.sh', *TARGET, '--yes')
  assert again.returncode == 0 and 'nothing to delete' in again.stdout
  assert [verb for verb in verbs(tpu) if verb.endswith('delete')] == ['queued-resources delete']


def test_delete_removes_a_tpu_that_was_made_without_a_queue(tpu):
  tpu.cloud(node='READY')
  assert tpu.call('delete.sh', *TARGET, '--yes').returncode == 0
  assert 'tpu-vm delete' in verbs(tpu) and tpu.cloud()['node'] is None


def test_logs_shows_the_newest_log(tpu):
  tpu.install()
  tpu.run('--fail')
  done = tpu.call('logs.sh', *TARGET, '--no-follow', '--lines=3')
  assert done.returncode == 0 and 'config.steps must be positive' in done.stdout


def test_fetch_brings_curves_and_no_checkpoint(tpu, tmp_path):
  tpu.install()
  run = tpu.root / 'host0' / 'moe_rl' / 'runs' / 'a run'
  (run / 'checkpoints' / '3').mkdir(parents=True)
  for name in ('events.out.tfevents.1', 'metrics.jsonl', 'config.json'):
    (run / name).write_text('one\n')
  fetched = tmp_path / 'fetched here'
  args = (*TARGET, '--workdir=runs/a run', f'--to={fetched}')
  assert tpu.call('fetch.sh', *args).returncode == 0
  assert sorted(p.name for p in fetched.iterdir()) == ['config.json', 'events.out.tfevents.1', 'metrics.jsonl']
  (run / 'metrics.jsonl').write_text('two\n')
  assert tpu.call('fetch.sh', *args).returncode == 0
  assert (fetched / 'metrics.jsonl').read_text() == 'two\n'
  missing = tpu.call('fetch.sh', *TARGET, '--workdir=runs/none')
  assert missing.returncode == 2 and 'there is no folder runs/none on this host' in missing.stderr


@pytest.mark.parametrize('lost', [dict(queued='SUSPENDED'), dict(queued='ACTIVE', node='PREEMPTED'), {}])
def test_resume_requests_installs_and_starts_the_same_command(tpu, lost):
  tpu.cloud(**lost)
  done = resume(tpu, '--setup=echo yes >"$HOME/mounted"')
  assert done.returncode == 0, done.stdout + done.stderr
  assert '4 chips, on demand. Costs about $16.80 an hour' in done.stdout
  assert ('queued-resources delete' in verbs(tpu)) == bool(lost)
  assert verbs(tpu).count('queued-resources create') == 1 and tpu.cloud()['node'] == 'READY'
  for host in HOSTS:
    assert tpu.main_calls(host) == [list(RUN)] and (tpu.root / host / 'mounted').exists()

  calls = len(tpu.gcloud_calls())
  again = resume(tpu)
  assert again.returncode == 0 and 'The run is alive on every host: nothing to do.' in again.stdout
  assert [call[3] for call in tpu.gcloud_calls()[calls:]] == ['describe', 'describe', 'ssh']


def test_resume_starts_all_hosts_again_where_one_run_has_died(tpu):
  tpu.cloud(queued='ACTIVE', node='READY')
  assert resume(tpu).returncode == 0
  other = tpu.pid('host1')
  os.kill(tpu.pid('host0'), signal.SIGKILL)
  wait_until(lambda: not is_alive(tpu.pid('host0')))
  done = resume(tpu)
  assert done.returncode == 0, done.stderr
  assert not is_alive(other) and 'queued-resources create' not in verbs(tpu)
  assert [tpu.main_calls(host) for host in HOSTS] == [[list(RUN)] * 2] * 2


def test_every_price_has_a_generation_a_list_price_and_a_lower_spot_price(tpu):
  text = (tpu.checkout / 'tpu_scripts' / 'prices.txt').read_text()
  assert 'https://cloud.google.com/tpu/pricing' in text and '2026-11-24' in text
  rows = [line.split() for line in text.splitlines() if line and not line.startswith('#')]
  assert [row[0] for row in rows] == ['v4', 'v5e', 'v5p', 'v6e']
  assert all(0 < float(spot) < float(listed) for _, listed, spot in rows)
