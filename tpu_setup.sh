#!/usr/bin/env bash
# A Cloud TPU slice from this checkout: create it, install on it, run commands on all of its workers, delete it.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./tpu_setup.sh [--dry-run] VERB

  create [--spot]            ask for the slice (a queued resource) and wait until it stands
  install                    sync this checkout to all workers; Python 3.11, the venv and the packages beside it
  run [--until-done] CMD...  sync, then CMD on all workers at once, in the synced folder and its environment;
                             CMD's exit status is this script's. --until-done: when a spot slice is pre-empted,
                             create it again (as spot), install, and run CMD again, which resumes from its
                             gs:// --workdir; a CMD that fails on a standing slice is not run again
  status                     the state of the queued resource and of its slice
  logs                       what the last run printed, from each worker
  ssh [--worker N]           a shell on worker N (default: 0)
  pull [--all] [--worker N] RUN [FOLDER]
                             copy a run to this machine: RUN is its working directory, runs/NAME on worker N (default:
                             0) or gs://...; FOLDER is runs/pulled/NAME unless given. Without its checkpoints and
                             profile, unless --all
  list                       all queued resources and slices of the PROJECT in its ZONE (ZONE=-: in every zone)
  delete                     give the slice back: it costs until then
  --dry-run                  print every command instead of running it

environment: required
  PROJECT ZONE TPU_NAME      for example PROJECT=my-project ZONE=us-central2-b TPU_NAME=my-tpu; for list the first two,
                             for pull gs://... the first
  ACCELERATOR                for create and run --until-done: v4-8, v5litepod-16, v5p-8, v6e-8, ...
environment: optional
  SPOT=1                     create: the same as --spot
  RUNTIME                    the TPU software version (default: the one for JAX on this ACCELERATOR)
  EXTRAS                     install: extras of pyproject.toml (default: tpu,gcs,demo)
  CREATE_TIMEOUT             seconds that create waits for the slice (default: 14400)
  MAX_PREEMPTIONS            how often run --until-done creates the slice again (default: 20)
  TRIES POLL                 attempts when ssh itself fails, seconds between two of them (default: 4, 30)
END
}

fail() { # MESSAGE [STATUS]
  echo "error: $1" >&2
  exit "${2:-1}"
}

note() { [[ -n $dry_run ]] || echo "tpu_setup.sh: $*" >&2; }

require() { # NAME=EXAMPLE...: one line for each variable that is missing
  local pair name missing=
  for pair in "$@"; do
    name=${pair%%=*}
    [[ -n ${!name:-} ]] || { missing=1 && echo "error: $name is not set: export $pair, for example" >&2; }
  done
  [[ -z $missing ]] || exit 2
}

x() { # COMMAND...: runs it; a dry run prints it
  if [[ -z $dry_run ]]; then "$@"; else printf '%q ' "$@" >&3 && echo >&3; fi
}

state() { # queued-resources|tpu-vm FIELDS ASSUMED: NOT_FOUND where there is none, ASSUMED in a dry run
  local describe=(gcloud compute tpus "$1" describe "$TPU_NAME" "${where[@]}" --format="value[separator=': ']($2)")
  if [[ -n $dry_run ]]; then
    x "${describe[@]}" && echo "$3"
  elif ! "${describe[@]}" 2>"$scratch/error"; then
    grep -q NOT_FOUND "$scratch/error" ||
      fail "gcloud cannot describe $TPU_NAME (logged in? TPU API enabled?): $(grep -m 1 ERROR "$scratch/error")"
    echo NOT_FOUND
  fi
}

queue_state() { # ASSUMED: ACTIVE, or FAILED: WHY
  local fields=state.state,state.failedData.error.message
  state queued-resources "$fields" "$1" | sed 's/: $//'
}

stands() { # a pre-empted slice shows in either of the two, first in one, then in the other
  local queue slice
  queue=$(queue_state ACTIVE) && slice=$(state tpu-vm state READY) || exit
  [[ $queue != NOT_FOUND ]] || fail "there is no $TPU_NAME in $ZONE: ./tpu_setup.sh create"
  [[ $queue == ACTIVE && $slice == READY ]]
}

create() { # [--spot]; where the request is already made, goes on waiting for it
  local answer current last='' deadline=$((SECONDS + CREATE_TIMEOUT)) runtime=${RUNTIME:-}
  [[ -n $runtime ]] || case $ACCELERATOR in
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "ACCELERATOR=$ACCELERATOR is none of v2- to v4-, v5litepod-, v5p-, v6e-: correct it, or set RUNTIME" 2 ;;
  esac
  answer=$(queue_state NOT_FOUND) || exit
  if [[ $answer == NOT_FOUND ]]; then
    x gcloud compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" "${where[@]}" \
      --accelerator-type="$ACCELERATOR" --runtime-version="$runtime" "$@"
  fi
  while :; do
    answer=$(queue_state ACTIVE) || exit
    current=${answer%%:*}
    [[ $current == "$last" ]] || note "$TPU_NAME is $current"
    # with --until-done, run counts a slice that is pre-empted again already
    if [[ $current == ACTIVE || (-n $until_done && $current == SUSPEND*) ]]; then return; fi
    [[ ! $current =~ ^(FAILED|SUSPEND|DELETING|NOT_FOUND) ]] ||
      fail "$TPU_NAME is $answer; ./tpu_setup.sh delete, then create, perhaps in another ZONE"
    ((SECONDS < deadline)) ||
      fail "$TPU_NAME is still $current after $CREATE_TIMEOUT s: ./tpu_setup.sh create waits on, delete gives up"
    last=$current
    sleep "$POLL"
  done
}

retried() { # STATUS COMMAND...: again where it ends with this STATUS; 255 is how ssh says that it failed itself
  local status tries
  for ((tries = 1; ; tries++)); do
    status=0
    x "${@:2}" </dev/null || status=$?
    ((status == $1 && tries < TRIES)) || return "$status"
    note "gcloud failed (status $status): again in $POLL s"
    sleep "$POLL"
  done
}

on_workers() { # SCRIPT [WORKER]; without the two options ssh waits for hours on a worker that was pre-empted
  retried 255 gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="${2:-all}" --command="$1" \
    --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=30
}

sync_tree() { # the working tree as it is, and of git what records a run's commit and edits; runs/ there stays
  git rev-parse -q --verify HEAD >/dev/null 2>&1 || fail "$PWD is no git checkout with a commit: git clone bigjax"
  x rm -rf "$scratch/git" &&
    x git clone --quiet --depth 1 --no-checkout "file://$PWD" "$scratch/git" &&
    { [[ -n $dry_run ]] || list_tree >"$scratch/files"; } &&
    x tar -cf "$scratch/bigjax.tar" --null -T "$scratch/files" &&
    x tar -rf "$scratch/bigjax.tar" -C "$scratch/git" .git &&
    retried 255 gcloud compute tpus tpu-vm scp "$scratch/bigjax.tar" "$TPU_NAME:bigjax.tar" "${where[@]}" \
      --worker=all --compress --scp-flag=-oConnectTimeout=20 &&
    on_workers 'set -e
mkdir -p ~/bigjax
find ~/bigjax -mindepth 1 -maxdepth 1 ! -name runs -exec rm -rf {} +
tar -xf ~/bigjax.tar -C ~/bigjax
git -C ~/bigjax reset --quiet'
}

list_tree() { # git also lists files that are deleted but not yet committed as such; tar would fail on them
  local file
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
  done
}

install() { # uv, because the images' own Python may be older than 3.11
  sync_tree && on_workers "set -e
cd ~/bigjax
python3 -m pip install --quiet --user --upgrade uv
python3 -m uv venv --quiet --allow-existing --python 3.11 ~/bigjax-venv
python3 -m uv pip install --quiet --python ~/bigjax-venv/bin/python -c constraints.txt -e '.[$EXTRAS]'"
}

run() { # CMD...
  local quoted script status fresh='' preemptions=0
  printf -v quoted '%q ' "$@"
  # What a lost connection left behind still holds the TPU, and jax.distributed catches SIGTERM: its group is killed.
  # A CMD's own 255 would pass for ssh's.
  script="cd ~/bigjax && test -x ~/bigjax-venv/bin/python ||
  { echo \"error: nothing is installed on \$(hostname): ./tpu_setup.sh install\" >&2; exit 2; }
kill -KILL -- -\$(cat ~/bigjax.pid 2>/dev/null) 2>/dev/null
echo \$\$ >~/bigjax.pid
export PATH=~/bigjax-venv/bin:\$PATH PYTHONUNBUFFERED=1
set -o pipefail
env $quoted 2>&1 | tee ~/bigjax.log
status=\$?
rm ~/bigjax.pid
exit \$((status == 255 ? 1 : status))"
  [[ -z $until_done || $quoted == *gs://* ]] || note "without a gs:// --workdir a pre-emption loses all progress"
  while :; do
    status=0
    { [[ -z $fresh ]] || install; } && sync_tree && on_workers "$script" || status=$?
    [[ $status != 0 && -n $until_done ]] || return "$status"
    sleep "$POLL" # the workers feel a pre-emption before the API tells of it
    if stands; then return "$status"; fi
    ((++preemptions <= MAX_PREEMPTIONS)) || fail "$TPU_NAME was pre-empted $preemptions times: raise MAX_PREEMPTIONS"
    note "$TPU_NAME was pre-empted: creating it again ($preemptions of at most $MAX_PREEMPTIONS)"
    retried 1 delete # it may refuse while SUSPENDING
    create --spot # only spot slices are pre-empted
    fresh=1
  done
}

status() {
  local queue slice
  queue=$(queue_state ACTIVE) && slice=$(state tpu-vm state READY) || exit
  [[ -n $dry_run ]] || printf '%s\n' "queued resource $TPU_NAME: $queue" "slice $TPU_NAME: $slice"
}

logs() { # with the worker's name before each line, since all workers answer at once
  on_workers "test -f ~/bigjax.log || { echo \"error: no run yet on \$(hostname): ./tpu_setup.sh run\" >&2; exit 1; }
sed \"s/^/\$(hostname): /\" ~/bigjax.log"
}

shell() { x gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$worker" --ssh-flag=-oConnectTimeout=20; }

list() {
  x gcloud compute tpus queued-resources list "${where[@]}" && x gcloud compute tpus tpu-vm list "${where[@]}"
}

pull() { # RUN FOLDER; .pulled says of which run a folder is, so that no two are mixed
  local quoted origin=$1 left=(--exclude=./checkpoints --exclude=./profile) kept='^(checkpoints|profile)/.*'
  [[ -z $all ]] || left=(--exclude=./.lock) kept='^[.]lock$'
  [[ $1 == gs://* ]] || origin="$1 of $TPU_NAME in $ZONE"
  [[ ! -d $2 || -z $(ls -A "$2") || $(cat "$2/.pulled" 2>/dev/null) == "$origin" ]] ||
    fail "$2 holds other things than $origin: name another FOLDER" 2
  if [[ $1 == gs://* ]]; then
    into "$2" "$origin" &&
      x gcloud storage rsync "$1" "$2" --recursive --exclude="$kept" --project="$PROJECT" --quiet
  else
    printf -v quoted '%q' "$1"
    on_workers "cd ~/bigjax 2>/dev/null && cd $quoted 2>/dev/null && test -f config.json ||
  { echo \"error: there is no run in $quoted on worker $worker: ./tpu_setup.sh ssh, and look\" >&2; exit 2; }
tar -cf ~/pulled-bigjax.tar ${left[*]} . || test \$? = 1 # a file that grew meanwhile" "$worker" &&
      retried 255 gcloud compute tpus tpu-vm scp "$TPU_NAME:pulled-bigjax.tar" "$scratch/bigjax.tar" "${where[@]}" \
        --worker="$worker" --compress --scp-flag=-oConnectTimeout=20 &&
      on_workers "rm ~/pulled-bigjax.tar" "$worker" &&
      into "$2" "$origin" &&
      x tar -xf "$scratch/bigjax.tar" -C "$2"
  fi || return
  note "$1 is in $2"
}

into() { # FOLDER ORIGIN
  x mkdir -p "$1" && { [[ -n $dry_run ]] || echo "$2" >"$1/.pulled"; }
}

delete() { x gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force; }

dry_run='' until_done='' spot='' verb='' worker=0 all='' source='' target=''
[[ ${SPOT:-0} == 0 ]] || spot=--spot
while (($#)); do
  case $verb:$1 in
    *:--dry-run) dry_run=1 ;;
    create:--spot) spot=--spot ;;
    run:--until-done) until_done=1 ;;
    :help | *:-h | *:--help) usage && exit ;;
    :create | :install | :run | :status | :logs | :ssh | :pull | :list | :delete) verb=$1 ;;
    run:[^-]*) break ;;
    pull:--all) all=1 ;;
    ssh:--worker | pull:--worker)
      [[ ${2:-} =~ ^[0-9]+$ ]] || fail "--worker needs a number, as 0: ./tpu_setup.sh $verb --worker 0" 2
      worker=$2
      shift
      ;;
    pull:[^-]*)
      [[ -z $target ]] || fail "pull takes a RUN and a FOLDER, not $1 too" 2
      if [[ -z $source ]]; then source=${1%/}; else target=$1; fi
      ;;
    *) fail "${verb:-tpu_setup.sh} does not know $1: ./tpu_setup.sh help" 2 ;;
  esac
  shift
done
[[ -n $verb ]] || fail "no verb: create, install, run, status, logs, ssh, pull, list or delete; ./tpu_setup.sh help" 2
[[ $verb != pull || -n $source ]] || fail "pull needs a run: ./tpu_setup.sh pull runs/mnist_cnn" 2
[[ $verb != run || $# -gt 0 ]] || fail "run needs a command: ./tpu_setup.sh run python experiments/vision/mnist_cnn.py" 2

required=(PROJECT=my-project)
[[ $source == gs://* ]] || required+=(ZONE=us-central2-b)
[[ $source == gs://* || $verb == list ]] || required+=(TPU_NAME=my-tpu)
[[ $verb != create && -z $until_done ]] || required+=(ACCELERATOR=v4-8)
require "${required[@]}"
: "${EXTRAS:=tpu,gcs,demo}" "${CREATE_TIMEOUT:=14400}" "${MAX_PREEMPTIONS:=20}" "${TRIES:=4}" "${POLL:=30}"
where=(--project="$PROJECT" --zone="${ZONE:-}" --quiet)
if [[ -z $dry_run ]]; then
  command -v gcloud >/dev/null || fail "gcloud is not on the PATH: install the Google Cloud CLI" 2
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
else
  scratch=${TMPDIR:-/tmp}/bigjax-sync POLL=0
fi
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
case $target in
  '') target=$PWD/runs/pulled/${source##*/} ;;
  /*) ;;
  *) target=$here/$target ;;
esac
export COPYFILE_DISABLE=1 # macOS: no ._ files in the tar
exec 3>&1                 # where a dry run prints, also from within $(...)

case $verb in
  create) create ${spot:+"$spot"} ;;
  ssh) shell ;;
  pull) pull "$source" "$target" ;;
  *) "$verb" "$@" ;;
esac
