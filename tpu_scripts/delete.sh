#!/usr/bin/env bash
# Deletes a TPU VM or pod slice and its queued resource, whatever runs there. Files on its own disks are gone then.
#
# Starts: nothing.
# Costs:  nothing; ends the billing of the TPU VM, which becomes $0 an hour.
#
# Usage: tpu_scripts/delete.sh --name=TPU --zone=ZONE --project=PROJECT --yes [--dry-run]
#   --name, --zone, --project   default: TPU_NAME, TPU_ZONE, TPU_PROJECT
#   --yes       delete; without it nothing is deleted
#   --dry-run   print each gcloud command and run none
#   --help      this text
#
# Run again, it finds nothing to delete. Fetch curves first: tpu_scripts/fetch.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

yes=0
while (($#)); do
  take_common_flag "$@"
  if ((!used)); then
    case $1 in
      --yes) yes=1 used=1 ;;
      *) die "unknown argument '$1': see --help" ;;
    esac
  fi
  shift "$used"
done
check_target
((yes || dry_run)) || die "nothing was deleted: $TPU_NAME and the files on its disks go with --yes"
show_start 'nothing, and ends the billing'

read_queued_state
if [[ $state == ABSENT ]]; then
  read_node_state
  if [[ $state == ABSENT ]]; then
    echo "There is no $TPU_NAME in $TPU_ZONE: nothing to delete, nothing billed (\$0 an hour)."
    exit 0
  fi
  # Made without a queue.
  show_and_run gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone="$TPU_ZONE" --project="$TPU_PROJECT" --quiet ||
    die "$TPU_NAME was not deleted and goes on being billed: see above"
else
  delete_queued
fi
if ((!dry_run)); then echo "$TPU_NAME is deleted: nothing is billed any more (\$0 an hour)."; fi
