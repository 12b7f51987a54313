# shellcheck shell=bash
# Sourced by the scripts beside it: the flags that all take, quoting, prices, the gcloud commands. Starts and
# costs nothing. Runs on the researcher's own machine, so it keeps to what the bash 3.2 of macOS knows.
# shellcheck disable=SC2034,SC2154  # variables set here are read by the scripts that source this; `here` is theirs

TPU_NAME=${TPU_NAME:-}
TPU_ZONE=${TPU_ZONE:-}
TPU_PROJECT=${TPU_PROJECT:-}
dry_run=0
force=0
TPU_TYPE=${TPU_TYPE:-}
spot=0
runtime=
poll=30  # seconds between two looks at a queued resource
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

# The flags that say what to create.
take_shape_flag() {
  case $1 in
    --type | --type=*) take_value TPU_TYPE --type "$@" ;;
    --runtime | --runtime=*) take_value runtime --runtime "$@" ;;
    --poll | --poll=*) take_value poll --poll "$@" ;;
    --spot) spot=1 used=1 ;;
  esac
}

# Sets generation, chips and runtime from TPU_TYPE. A v4 or v5p type counts cores, two a chip; the others chips.
check_shape() {
  local image count cores=1
  check_word --type TPU_TYPE "$TPU_TYPE" '^[a-z0-9]+-[0-9x]+$' v5p-8
  [[ $poll =~ ^[1-9][0-9]*$ ]] || die "--poll=$poll is no whole number of seconds above 0"
  count=${TPU_TYPE##*-}
  case ${TPU_TYPE%-*} in
    v4) generation=v4 cores=2 image=tpu-ubuntu2204-base ;;
    v5litepod) generation=v5e image=v2-alpha-tpuv5-lite ;;
    v5p) generation=v5p cores=2 image=v2-alpha-tpuv5 ;;
    v6e) generation=v6e image=v2-alpha-tpuv6e ;;
    v5e) die "'$TPU_TYPE': Cloud TPU calls this generation v5litepod: --type=v5litepod-${count}" ;;
    tpu7x) die "'$TPU_TYPE': Cloud TPU offers tpu7x through Kubernetes Engine alone, not as queued resources" ;;
    *) die "'$TPU_TYPE' is no TPU type known here: v4-N, v5p-N (N cores), v5litepod-N or v6e-N (N chips)" ;;
  esac
  [[ $count =~ ^[1-9][0-9]{0,4}$ ]] || die "'$TPU_TYPE': after the dash comes a number, such as ${TPU_TYPE%-*}-8"
  ((count % cores == 0)) || die "'$TPU_TYPE': the number after the dash must be a multiple of $cores, such as ${TPU_TYPE%-*}-8"
  chips=$((count / cores))
  runtime=${runtime:-$image}
}

# What the type costs an hour, by prices.txt beside this file.
hourly() {
  awk -v generation="$generation" -v chips="$chips" -v spot="$spot" '
    $1 == generation {
      price = spot ? $3 : $2
      printf "about $%.2f an hour ($%.2f a chip-hour, %s; see prices.txt)", price * chips, price, spot ? "estimate" : "list price"
      found = 1
    }
    END { exit !found }' "$here/prices.txt" || die "$here/prices.txt has no price of $generation"
}

# What is created, and its price.
show_cost() {
  local how='on demand' cost
  if ((spot)); then how=spot; fi
  cost=$(hourly) || exit 2
  echo "Starts $TPU_NAME: $TPU_TYPE, $chips chips, $how. Costs $cost until deleted."
}

# $1: what is started beside a TPU VM that is there, whose price is known where its type is.
show_start() {
  local cost
  cost=$(check_shape 2>/dev/null && echo "on demand $(hourly)") ||
    cost='its chips times the price in prices.txt, an hour (in dollars where TPU_TYPE is set)'
  echo "Starts $1. Costs nothing by itself; $TPU_NAME is billed while it exists: $cost."
}

queued() {
  local verb=$1
  shift
  queued_words=(gcloud compute tpus queued-resources "$verb" "$TPU_NAME" --zone="$TPU_ZONE" --project="$TPU_PROJECT" "$@")
}

# Runs gcloud ... describe, given as arguments; what it printed into `state`, ABSENT where there is no such thing.
read_state() {
  printf '+ %s\n' "$(quote_all "$@")"
  state=UNKNOWN
  ((!dry_run)) || return 0
  if ! state=$("$@" 2>&1); then
    [[ $state == *NOT_FOUND* || $state == *'not found'* ]] || die "gcloud could not say how $TPU_NAME is: $state"
    state=ABSENT
  fi
}

read_queued_state() {
  queued describe '--format=value(state.state)'
  read_state "${queued_words[@]}"
}

read_node_state() {
  read_state gcloud compute tpus tpu-vm describe "$TPU_NAME" --zone="$TPU_ZONE" --project="$TPU_PROJECT" \
    '--format=value(state)'
}

create_queued() {
  queued create --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" --runtime-version="$runtime"
  if ((spot)); then queued_words+=(--spot); fi
  show_and_run "${queued_words[@]}" || die "$TPU_NAME was not requested: see above"
}

delete_queued() {
  queued delete --force --quiet
  show_and_run "${queued_words[@]}" || die "$TPU_NAME was not deleted and may go on being billed: see above"
}

wait_until_active() {
  ((!dry_run)) || return 0
  while :; do
    read_queued_state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | ABSENT)
        die "$TPU_NAME is $state and will not become active: tpu_scripts/resume.sh requests it anew" ;;
    esac
    echo "$TPU_NAME is $state; looking again in $poll s. Ctrl-C ends the looking, not the request."
    sleep "$poll"
  done
}
