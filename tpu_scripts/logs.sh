#!/usr/bin/env bash
# Shows the newest log of a run on a TPU VM or pod slice, and follows it.
#
# Starts: nothing that stays.
# Costs:  nothing by itself, but a TPU VM is billed while it exists: prices.txt, times its chips, an hour.
#
# Usage: tpu_scripts/logs.sh --name=TPU --zone=ZONE --project=PROJECT [--worker=N] [--lines=N] [--no-follow]
#                            [--dry-run]
#   --name, --zone, --project   default: TPU_NAME, TPU_ZONE, TPU_PROJECT
#   --worker    host to read, or all; default 0
#   --lines     how many lines to begin with; default 100
#   --no-follow end after these
#   --dry-run   print the gcloud command and run none
#   --help      this text
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

worker=0 lines=100 follow=' -F'
while (($#)); do
  take_common_flag "$@"
  if ((!used)); then
    case $1 in
      --worker | --worker=*) take_value worker --worker "$@" ;;
      --lines | --lines=*) take_value lines --lines "$@" ;;
      --no-follow) follow='' used=1 ;;
      *) die "unknown argument '$1': see --help" ;;
    esac
  fi
  shift "$used"
done
check_target
[[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker=$worker is no host number and not 'all'"
[[ $lines =~ ^[0-9]+$ ]] || die "--lines=$lines is no whole number"
show_start 'nothing'

make_ssh_words "$worker" "tail -n $lines$follow moe_rl_logs/latest.log"
show_and_run "${ssh_words[@]}" ||
  die "no log was read from $TPU_NAME: see above; a run that tpu_scripts/run.sh started writes one"
