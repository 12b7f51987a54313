#!/usr/bin/env bash
# Runs `python -m moe_rl.main ARGUMENTS` on every host of a TPU VM or pod slice, the same everywhere.
#
# Starts: one process a host, detached: it goes on when this terminal closes. Nothing that is billed.
# Costs:  nothing by itself, but a TPU VM is billed while it exists, also after the run has ended.
#
# Usage: tpu_scripts/run.sh --name=TPU --zone=ZONE --project=PROJECT [--force] [--watch=SECONDS] [--dry-run]
#                           -- ARGUMENTS
#   --name, --zone, --project   the TPU VM; default: TPU_NAME, TPU_ZONE, TPU_PROJECT
#   --force     stop the run that is alive there, giving it two minutes to save, then start this one
#   --watch     seconds to see whether it ends at once, as on a refused config; default 10
#   --dry-run   print each gcloud command and run none
#   --help      this text
# ARGUMENTS go to moe_rl.main as they are, spaces and quotes included. On several hosts the workdir must be
# one that all of them reach, such as a mounted bucket or disk.
#
# Refuses while a run is alive on any host. Each host logs to ~/moe_rl_logs; how to follow the log and how to
# stop the run is printed. Example, with TPU_NAME, TPU_ZONE and TPU_PROJECT set:
#   tpu_scripts/run.sh -- --config=experiments/r1_zero.py
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

watch=10
separated=0
while (($#)); do
  if [[ $1 == -- ]]; then
    separated=1
    shift
    break
  fi
  take_common_flag "$@"
  if ((!used)); then
    case $1 in
      --watch | --watch=*) take_value watch --watch "$@" ;;
      *) die "unknown argument '$1': moe_rl.main's go after --, this script's own are in --help" ;;
    esac
  fi
  shift "$used"
done
check_target
[[ $watch =~ ^[0-9]+$ ]] || die "--watch=$watch is no whole number of seconds"
((separated && $#)) ||
  die 'nothing to run: give moe_rl.main its arguments after --, such as -- --config=experiments/r1_zero.py'
show_start "one process on every host of $TPU_NAME"

on_host='bash moe_rl/tpu_scripts/on_host.sh'
if ((force)); then
  on_every_host "$on_host stop" ||
    die 'nothing was started: the old run could not be stopped on every host (see above)'
else
  # Asked of all hosts before any starts: half of a slice would only wait for the other half.
  on_every_host "$on_host check" ||
    die 'nothing was started: a host has a run alive or cannot start one, see above; --force stops that run'
fi
on_every_host "$on_host start $watch $(quote_all "$@")" ||
  die 'the run did not start on every host, or ended with an error: see above'

make_ssh_words 0 'tail -n 100 -F moe_rl_logs/latest.log'
printf '\nFollow host 0:  %s\n' "$(quote_all "${ssh_words[@]}")"
make_ssh_words all "$on_host stop"
printf 'Stop all hosts: %s\n' "$(quote_all "${ssh_words[@]}")"
echo 'The TPU VM is billed until it is deleted, also after the run.'
