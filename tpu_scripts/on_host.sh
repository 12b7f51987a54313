#!/usr/bin/env bash
# The part that install.sh and run.sh have executed on each TPU host; not meant for your own machine.
#
# Starts: with `start`, the training process of this host; otherwise nothing that stays.
# Costs:  nothing beyond the TPU VM, which is billed while it exists.
#
# Usage: on_host.sh install FORCE COMMIT PYTHON   ~/moe_rl_tree.tar.gz into ~/moe_rl and ~/moe_rl_venv
#        on_host.sh check                         exit 0 if a run could start here, else say why not
#        on_host.sh start SECONDS ARGUMENTS       start moe_rl.main detached, watch it for so long
#        on_host.sh alive                         exit 0 if a run is alive here
#        on_host.sh collect WORKDIR               its curves into ~/moe_rl_curves.tar.gz, no checkpoints
#        on_host.sh stop                          SIGTERM, two minutes to save, then SIGKILL
set -euo pipefail

tree=$HOME/moe_rl
venv=$HOME/moe_rl_venv
logs=$HOME/moe_rl_logs
archive=$HOME/moe_rl_tree.tar.gz
manifest=$tree/.installed_files
# Held by the run as an open file: the kernel frees it however the process ends, so that neither a crash nor a
# reboot nor a reused process id looks like a run.
lock=$logs/run.lock
pid_file=$logs/run.pid
save_seconds=120

say() { printf '%s: %s\n' "$(hostname)" "$*"; }
die() {
  say "$*" >&2
  exit 3
}

run_is_alive() { ! flock --nonblock "$lock" true; }
run_pid() { cat "$pid_file" 2>/dev/null || echo unknown; }

find_python() {
  local candidate
  for candidate in ${1:+"$1"} python3.13 python3.12 python3.11 python3; do
    # Debian and Ubuntu package ensurepip separately; without it venv makes no pip.
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    [[ -z $1 ]] || die "$1 is no Python >= 3.11 with venv on this host: give another --python"
  done
  die 'no Python >= 3.11 with venv here: create the TPU VM with an Ubuntu 24.04 image, or install one' \
    'on every host (sudo apt-get install -y python3.11 python3.11-venv)'
}

# Removes what the last install brought and this one lacks; what runs have written is in neither list.
unpack() {
  local listed gone
  listed=$(mktemp)
  tar --quoting-style=literal -tzf "$archive" | LC_ALL=C sort >"$listed"
  if [[ -e $manifest ]]; then
    LC_ALL=C comm -23 "$manifest" "$listed" | while IFS= read -r gone; do rm -f -- "$tree/$gone"; done
  fi
  tar --no-same-owner -xzf "$archive" -C "$tree"
  mv "$listed" "$manifest"
}

install_here() {
  local force=$1 commit=$2 python=$3
  if run_is_alive && ((!force)); then
    die "a run is alive (pid $(run_pid)): nothing was installed; stop it first, or use --force"
  fi
  if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python=$(find_python "$python")
    "$python" -m venv --clear "$venv"
  fi
  unpack
  cd "$tree"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[tpu]'
  rm -f "$archive"
  say "moe_rl at $commit, $("$venv/bin/python" -c 'import importlib.metadata as m, platform as p
print("jax", m.version("jax") + ", Python", p.python_version())')"
}

check() {
  [[ -x $venv/bin/python && -e $manifest ]] ||
    die 'moe_rl is not installed here: run tpu_scripts/install.sh first'
  if run_is_alive; then
    die "a run is alive (pid $(run_pid)), log $(readlink -f "$logs/latest.log")"
  fi
}

alive() {
  run_is_alive || die 'no run is alive'
  say "a run is alive (pid $(run_pid))"
}

collect() {
  local file files=()
  cd "$tree"
  cd "$1" 2>/dev/null || die "there is no folder $1 on this host, as seen from $tree"
  for file in events.out.tfevents.* metrics.jsonl evaluations.jsonl summary.json config.json; do
    if [[ -e $file ]]; then files+=("$file"); fi
  done
  ((${#files[@]})) || die "$1 has no TensorBoard events: is it the --workdir of a run that has begun?"
  # A run may be writing: tar then says that a file changed, which is no error here.
  tar --warning=no-file-changed -czf "$HOME/moe_rl_curves.tar.gz" "${files[@]}" || (($? == 1))
  say "${#files[@]} files of $1"
}

# Becomes the run: the process id stays the same, and the lock is inherited.
hold_lock_and_run() {
  exec 9>"$lock"
  # 2 s: another script may be looking at the lock at this moment.
  flock --wait 2 9 || die 'another run has started meanwhile'
  echo "$$" >"$pid_file"
  exec python -m moe_rl.main "$@"
}

start() {
  local seconds=$1 log child status=0 i
  shift
  check
  log=$logs/$(date -u +%Y%m%dT%H%M%SZ)-$(hostname).log
  ln -sfn "$log" "$logs/latest.log"
  cd "$tree"
  # A session of its own: the end of the ssh connection does not reach it.
  PYTHONUNBUFFERED=1 PATH=$venv/bin:$PATH setsid bash tpu_scripts/on_host.sh hold_lock_and_run "$@" \
    >"$log" 2>&1 </dev/null &
  child=$!
  for ((i = 0; i < 10 * seconds; i++)); do
    kill -0 "$child" 2>/dev/null || break
    sleep 0.1
  done
  if kill -0 "$child" 2>/dev/null; then
    say "running, pid $child, log $log"
    return
  fi
  wait "$child" || status=$?
  say "ended within $seconds s with exit status $status; the last lines of $log:"
  tail -n 30 "$log"
  return "$status"
}

stop() {
  local pid i
  if ! run_is_alive; then
    say 'no run is alive'
    return
  fi
  pid=$(run_pid)
  [[ $pid =~ ^[0-9]+$ ]] || die "a run holds $lock, but $pid_file has no process id: stop it by hand"
  # Only the main process is asked to end: it saves, then ends its own workers.
  say "stopping pid $pid; up to $save_seconds s to save"
  kill -TERM "$pid" 2>/dev/null || true
  for ((i = 0; i < 10 * save_seconds; i++)); do
    run_is_alive || break
    sleep 0.1
  done
  # The whole session, workers that it left behind included.
  kill -KILL -- "-$pid" 2>/dev/null || true
  flock --wait 10 "$lock" true || die "pid $pid does not end: restart the host"
  say 'stopped'
}

mkdir -p "$logs"
case ${1:-} in
  install) install_here "$2" "$3" "$4" ;;
  check | alive | stop) "$1" ;;
  collect) collect "$2" ;;
  start | hold_lock_and_run) "$@" ;;
  *) die "unknown command '${1:-}'" ;;
esac
