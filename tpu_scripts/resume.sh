#!/usr/bin/env bash
# Brings a run back after its TPU was preempted: requests the TPU anew, installs moe_rl, starts the same run command.
#
# Starts: the TPU VMs of the type given, where they are gone; then one process a host.
# Costs:  the price a chip-hour in prices.txt times the chips, an hour, until it is deleted; printed before anything
#         is requested.
#
# Usage: tpu_scripts/resume.sh --name=TPU --zone=ZONE --project=PROJECT --type=TYPE [--spot] [--runtime=IMAGE]
#                              [--python=PYTHON] [--setup=COMMAND] [--watch=SECONDS] [--poll=SECONDS] [--dry-run]
#                              -- ARGUMENTS
#   --name, --zone, --project, --type   default: TPU_NAME, TPU_ZONE, TPU_PROJECT, TPU_TYPE
#   --spot, --runtime, --poll           as in create.sh
#   --python    as in install.sh
#   --setup     shell line for every host before the run starts, such as one that mounts a disk; it may run again
#   --watch     as in run.sh
#   --dry-run   print the commands and run none
#   --help      this text
# ARGUMENTS go to moe_rl.main, and must be those of the run: it goes on from the newest checkpoint in its --workdir.
# The workdir must be on storage that survives the TPU VM and that all hosts reach under one path: a gs:// bucket
# mounted by gcsfuse, or a shared disk (NFS). What was on the VM's own disk is gone.
#
# Run again, it does what is left to do; nothing while the run is alive on all hosts.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

python='' setup='' watch=10 separated=0
while (($#)); do
  if [[ $1 == -- ]]; then
    separated=1
    shift
    break
  fi
  take_common_flag "$@"
  if ((!used)); then take_shape_flag "$@"; fi
  if ((!used)); then
    case $1 in
      --python | --python=*) take_value python --python "$@" ;;
      --setup | --setup=*) take_value setup --setup "$@" ;;
      --watch | --watch=*) take_value watch --watch "$@" ;;
      *) die "unknown argument '$1': moe_rl.main's go after --, this script's own are in --help" ;;
    esac
  fi
  shift "$used"
done
check_target
check_shape
[[ $watch =~ ^[0-9]+$ ]] || die "--watch=$watch is no whole number of seconds"
((separated && $#)) || die 'nothing to resume: give the arguments of the run after --, the very same'
words=" $* "
[[ $words == *' --workdir'[\ =]* ]] ||
  die 'the run has no --workdir: after a preemption only one on storage that survives has its checkpoints'
[[ $words != *' --workdir'[\ =]gs://* ]] ||
  die 'moe_rl.main needs a folder as --workdir: mount the bucket with gcsfuse (see --setup) and give its path'
show_cost

read_queued_state
case $state in
  ACTIVE)
    read_node_state
    if [[ $state == READY ]]; then
      if on_every_host 'bash moe_rl/tpu_scripts/on_host.sh alive'; then
        echo 'The run is alive on every host: nothing to do.'
        exit 0
      fi
    else
      delete_queued
      create_queued
    fi
    ;;
  ABSENT) create_queued ;;
  FAILED | SUSPENDED | SUSPENDING | DELETING | UNKNOWN)
    delete_queued
    create_queued
    ;;
  *) echo "$TPU_NAME was requested already and is $state." ;;
esac
wait_until_active

export TPU_TYPE
options=(--name="$TPU_NAME" --zone="$TPU_ZONE" --project="$TPU_PROJECT")
if ((dry_run)); then options+=(--dry-run); fi
# --force: a half of the slice that is still alive would only wait for the other half.
"$here/install.sh" "${options[@]}" --force ${python:+"--python=$python"}
if [[ -n $setup ]]; then on_every_host "$setup" || die 'nothing was started: --setup failed on a host, see above'; fi
exec "$here/run.sh" "${options[@]}" --force --watch="$watch" -- "$@"
