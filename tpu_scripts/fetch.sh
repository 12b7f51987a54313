#!/usr/bin/env bash
# Copies a run's TensorBoard events, metrics and summary from a TPU VM to this machine; no checkpoints.
#
# Starts: nothing that stays.
# Costs:  nothing by itself, but a TPU VM is billed while it exists: prices.txt, times its chips, an hour.
#
# Usage: tpu_scripts/fetch.sh --name=TPU --zone=ZONE --project=PROJECT --workdir=DIR [--to=DIR] [--dry-run]
#   --name, --zone, --project   default: TPU_NAME, TPU_ZONE, TPU_PROJECT
#   --workdir   the run's --workdir, as moe_rl.main has it (relative to ~/moe_rl on the host)
#   --to        folder on this machine; default: runs/TPU
#   --dry-run   print each gcloud command and run none
#   --help      this text
#
# Host 0 writes them, so they are read there. Run again, it brings the newer ones; look with
#   tensorboard --logdir=runs
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

workdir='' to=''
while (($#)); do
  take_common_flag "$@"
  if ((!used)); then
    case $1 in
      --workdir | --workdir=*) take_value workdir --workdir "$@" ;;
      --to | --to=*) take_value to --to "$@" ;;
      *) die "unknown argument '$1': see --help" ;;
    esac
  fi
  shift "$used"
done
check_target
[[ -n $workdir ]] || die "no run given: pass --workdir=DIR, the run's own"
to=${to:-runs/$TPU_NAME}
show_start 'nothing that stays'

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
make_ssh_words 0 "bash moe_rl/tpu_scripts/on_host.sh collect $(quote_all "$workdir")"
show_and_run "${ssh_words[@]}" || die 'nothing was fetched: see above'
show_and_run gcloud compute tpus tpu-vm scp "$TPU_NAME:moe_rl_curves.tar.gz" "$scratch/curves.tar.gz" \
  --zone="$TPU_ZONE" --project="$TPU_PROJECT" --worker=0 || die 'nothing was fetched: see above'
if ((!dry_run)); then
  mkdir -p "$to"
  tar --no-same-owner -xzf "$scratch/curves.tar.gz" -C "$to"
  echo "Fetched into $to. Look with: tensorboard --logdir=$(quote_all "$to")"
fi
