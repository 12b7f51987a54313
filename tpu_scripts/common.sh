# shellcheck shell=bash
# Sourced by install.sh and run.sh: the flags that both take, quoting, the two gcloud commands. Starts and
# costs nothing. Runs on the researcher's own machine, so it keeps to what the bash 3.2 of macOS knows.
# shellcheck disable=SC2034  # variables set here are read by the scripts that source this

TPU_NAME=${TPU_NAME:-}
TPU_ZONE=${TPU_ZONE:-}
TPU_PROJECT=${TPU_PROJECT:-}
dry_run=0
force=0
used=0  # how many arguments the last take_common_flag consumed

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# The comment that a script opens with is its help.
show_help() {
  awk 'NR > 1 { if ($0 !~ /^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

# Single quotes around $1, whatever it holds: every POSIX shell reads back exactly $1.
quote() {
  local text=$1 mark="'" out=
  while [[ $text == *"$mark"* ]]; do
    out+="${text%%"$mark"*}'\\''"
    text=${text#*"$mark"}
  done
  printf "'%s'" "$out$text"
}

# Quotes each argument that needs it; the words joined by spaces.
quote_all() {
  local word gap=
  for word in "$@"; do
    printf '%s' "$gap"
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then printf '%s' "$word"; else quote "$word"; fi
    gap=' '
  done
}

# The value of a flag written as --flag=VALUE or --flag VALUE goes into the variable named by $1.
take_value() {
  local variable=$1 flag=$2
  shift 2
  case $1 in
    "$flag="*) printf -v "$variable" '%s' "${1#*=}"; used=1 ;;
    *)
      (($# > 1)) || die "$flag needs a value: $flag=VALUE"
      printf -v "$variable" '%s' "$2"
      used=2
      ;;
  esac
}

take_common_flag() {
  used=0
  case $1 in
    --name | --name=*) take_value TPU_NAME --name "$@" ;;
    --zone | --zone=*) take_value TPU_ZONE --zone "$@" ;;
    --project | --project=*) take_value TPU_PROJECT --project "$@" ;;
    --dry-run) dry_run=1 used=1 ;;
    --force) force=1 used=1 ;;
    --help | -h) show_help; exit 0 ;;
  esac
}

# $1 flag, $2 environment variable, $3 value, $4 pattern, $5 example.
check_word() {
  [[ -n $3 ]] || die "no TPU ${1#--} given: pass $1=$5 or set $2"
  [[ $3 =~ $4 ]] || die "'$3' is no TPU ${1#--}: $1 (or $2) should look like $5"
}

check_target() {
  check_word --name TPU_NAME "$TPU_NAME" '^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$' my-tpu
  check_word --zone TPU_ZONE "$TPU_ZONE" '^[a-z]+-[a-z]+[0-9]+-([a-z]|ai[0-9]+[a-z])$' us-central2-b
  check_word --project TPU_PROJECT "$TPU_PROJECT" '^([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$' my-project
  ((dry_run)) || command -v gcloud >/dev/null ||
    die 'gcloud is not on PATH: install the Google Cloud CLI, or look at the commands with --dry-run'
}

# Prints the command so that it can be pasted into a shell, then runs it unless this is a dry run.
show_and_run() {
  printf '+ %s\n' "$(quote_all "$@")"
  ((dry_run)) || "$@"
}

# Puts into ssh_words the ssh command for worker $1 (a number, or `all`); $2 is the remote shell's line.
make_ssh_words() {
  ssh_words=(
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$TPU_ZONE" --project="$TPU_PROJECT"
    --worker="$1" --command="$2"
  )
}

on_every_host() {
  make_ssh_words all "$1"
  show_and_run "${ssh_words[@]}"
}

copy_to_every_host() {
  show_and_run gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:$2" \
    --zone="$TPU_ZONE" --project="$TPU_PROJECT" --worker=all
}
