#!/usr/bin/env bash
# Requests a TPU VM or pod slice as a queued resource, and waits until it is there.
#
# Starts: the TPU VMs of the type given, once Google Cloud has them.
# Costs:  the price a chip-hour in prices.txt times the chips, an hour, billed from when it is active until it is deleted;
#         printed before anything is requested.
#
# Usage: tpu_scripts/create.sh --name=TPU --zone=ZONE --project=PROJECT --type=TYPE [--spot] [--runtime=IMAGE]
#                              [--no-wait] [--poll=SECONDS] [--dry-run]
#   --name, --zone, --project   default: TPU_NAME, TPU_ZONE, TPU_PROJECT
#   --type      v5p-8, v4-8 (cores, two a chip), v5litepod-16, v6e-16 (chips) and so on; default: TPU_TYPE
#   --spot      cheaper, but may be taken away at any time: tpu_scripts/resume.sh goes on
#   --runtime   the VM's image; default: the generation's own. moe_rl needs Python 3.11 or newer there
#   --no-wait   return once it is requested
#   --poll      seconds between two looks; default 30
#   --dry-run   print each gcloud command and run none
#   --help      this text
#
# Run again, it requests nothing anew and waits for what was requested.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

wait=1
while (($#)); do
  take_common_flag "$@"
  if ((!used)); then take_shape_flag "$@"; fi
  if ((!used)); then
    case $1 in
      --no-wait) wait=0 used=1 ;;
      *) die "unknown argument '$1': see --help" ;;
    esac
  fi
  shift "$used"
done
check_target
check_shape
show_cost

read_queued_state
case $state in
  ABSENT | UNKNOWN) create_queued ;;
  FAILED | SUSPENDED | SUSPENDING | DELETING)
    die "$TPU_NAME is there but $state: tpu_scripts/resume.sh requests it anew, tpu_scripts/delete.sh removes it" ;;
  *) echo "$TPU_NAME was requested already and is $state: nothing new is requested." ;;
esac
if ((wait)); then wait_until_active; fi
if ((!dry_run)); then echo 'Install with tpu_scripts/install.sh. Stop the billing with tpu_scripts/delete.sh.'; fi
