#!/usr/bin/env bash
# Installs this working tree of moe_rl, with the tpu extra, on every host of a TPU VM or pod slice.
#
# Starts: nothing that is billed. A few minutes of copying and pip on hosts that exist already.
# Costs:  nothing by itself, but a TPU VM is billed while it exists, busy or not: delete it when done.
#
# Usage: tpu_scripts/install.sh --name=TPU --zone=ZONE --project=PROJECT [--python=PYTHON] [--force]
#                               [--dry-run]
#   --name, --zone, --project   the TPU VM; default: TPU_NAME, TPU_ZONE, TPU_PROJECT
#   --python    interpreter on the hosts, 3.11 or newer; default: the newest of those it finds there
#   --force     install although a run is alive there: its new worker processes would read the new files
#   --dry-run   print each gcloud command and run none
#   --help      this text
#
# Copies the files that git tracks, as they are now, and untracked ones that git does not ignore, into
# ~/moe_rl; the virtual environment is ~/moe_rl_venv. Run again, it updates both in place: files that are gone
# here go there too, and what runs have written stays.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

python=
while (($#)); do
  take_common_flag "$@"
  if ((!used)); then
    case $1 in
      --python | --python=*) take_value python --python "$@" ;;
      *) die "unknown argument '$1': see --help" ;;
    esac
  fi
  shift "$used"
done
check_target
show_start "pip on every host of $TPU_NAME, which ends"

root=$(cd "$here/.." && pwd)
cd "$root"
commit=$(git describe --always --dirty 2>/dev/null) ||
  die "$root is no git checkout with a commit: the files to copy are those that git lists"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# A tracked file that was deleted is still listed by git, and tar would stop at it.
git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d '' file; do
    if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
  done >"$scratch/files"
archive=$scratch/moe_rl_tree.tar.gz
((dry_run)) || COPYFILE_DISABLE=1 tar --null -czf "$archive" -T "$scratch/files"

count=$(LC_ALL=C tr -cd '\0' <"$scratch/files" | wc -c | tr -d ' ')
echo "moe_rl at $commit, $count files -> every host of $TPU_NAME"
copy_to_every_host "$archive" moe_rl_tree.tar.gz || die 'the files did not reach every host: see above'
# The hosts' part travels in the archive, so it always has the version of the tree it installs.
on_every_host "mkdir -p moe_rl && tar -xzf moe_rl_tree.tar.gz -C moe_rl tpu_scripts/on_host.sh &&\
 bash moe_rl/tpu_scripts/on_host.sh install $force $(quote_all "$commit") $(quote "$python")" ||
  die 'not installed on every host: see above'
if ((!dry_run)); then echo "Installed on every host. Start a run with tpu_scripts/run.sh."; fi
