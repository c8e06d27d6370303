#!/usr/bin/env bash
# Train on Cloud TPU VMs with nothing but gcloud: create, setup, run, status, logs, stop. Every command may be repeated. See usage() below.
set -euo pipefail

root=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)

say() { printf 'tpu_vm.sh: %s\n' "$*" >&2; }
die() { say "$1"; exit "${2:-2}"; }

usage() {
    cat <<END
usage: scripts/tpu_vm.sh COMMAND NAME [OPTIONS] [-- ARGUMENTS OF train]

  create   ask for the TPU as a queued resource and wait until it is there; again: nothing, or a new one after a preemption
  setup    copy this checkout to all hosts and make its environment there; again: bring both up to date
  run      start 'train ARGUMENTS' on all hosts, each with a log; --keep: stay, and after a preemption or a lost host create, set up and go on
  status   the state of the TPU, and whether the run is going, on every host
  logs     the end of every host's log
  stop     end the run (SIGTERM: it saves) and delete the TPU; --run-only keeps the TPU

  --type TYPE       v6e-16, v5e-8, v5p-128, v4-8 (v5p and v4 count cores, two a chip)
  --slices N        so many slices of that type (default 1)
  --zone ZONE       default: that of gcloud's configuration     --project PROJECT   the same
  --spot            cheaper, and may be preempted                --version V         runtime version in place of the type's own
  --bucket gs://B   checkpoints and compiled programs go to B/NAME (say it to setup too); without it, they must be on a disk that all share
  --keep            see run                                      --dry-run           print what would be done, and do nothing

From zero to a running job: docs/tpu_vm.md
END
}

[ $# -gt 0 ] || { usage; exit 0; }
case $1 in -h | --help | help) usage; exit 0 ;; esac
command=$1
shift
case $command in create | setup | run | status | logs | stop) ;; *) die "there is no command '$command'; choose from: create setup run status logs stop" ;; esac
[ $# -gt 0 ] && [ "${1#-}" = "$1" ] || die "give the TPU a name: scripts/tpu_vm.sh $command NAME"
name=$1
shift
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || die "the name '$name' must be lower-case letters, digits and '-', beginning with a letter"

type='' slices=1 zone='' project='' version='' bucket='' tier=() keep='' dry='' run_only=''
need() { [ $# -ge 2 ] || die "$1 needs a value"; }
while [ $# -gt 0 ]; do
    case $1 in
        --type) need "$@"; type=$2; shift ;;
        --slices) need "$@"; slices=$2; shift ;;
        --zone) need "$@"; zone=$2; shift ;;
        --project) need "$@"; project=$2; shift ;;
        --version) need "$@"; version=$2; shift ;;
        --bucket) need "$@"; bucket=${2%/}; shift ;;
        --spot) tier=(--spot) ;;
        --keep) keep=1 ;;
        --run-only) run_only=1 ;;
        --dry-run) dry=1 ;;
        --) shift; break ;;
        *) die "there is no option '$1'; see scripts/tpu_vm.sh --help (arguments of train come after --)" ;;
    esac
    shift
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices is '$slices'; it must be a number of at least 1"
[ -z "$bucket" ] || [ "${bucket#gs://}" != "$bucket" ] || die "--bucket is '$bucket'; it must begin with gs://"
command -v gcloud >/dev/null || [ -n "$dry" ] || die "gcloud is not on the PATH: install the Google Cloud CLI, then 'gcloud auth login'"
if [ -z "$zone" ] && [ -z "$dry" ]; then zone=$(gcloud config get compute/zone 2>/dev/null || true); fi
[ -n "$zone" ] || [ -n "$dry" ] || die "no zone: give --zone, or 'gcloud config set compute/zone ZONE'"
where=(--zone "${zone:-ZONE}" ${project:+--project "$project"})
folder='$HOME/minllm'       # on the hosts; expanded there
period=${TPU_VM_PERIOD:-30} # seconds between looks

# What changes something goes through `change`, what looks through `look`, so that a dry run shows the first and skips the second.
change() {
    if [ -n "$dry" ]; then printf '+ gcloud'; printf ' %q' "$@"; printf '\n'; else gcloud "$@"; fi
}
look() { [ -n "$dry" ] || gcloud "$@"; }

state() {
    local s
    s=$(look compute tpus queued-resources describe "$name" "${where[@]}" --format 'value(state.state)' 2>&1) || {
        case $s in *NOT_FOUND* | *"not found"*) s=NONE ;; *) die "gcloud could not tell the state of $name: $s" 1 ;; esac
    }
    echo "${s:-NONE}"
}

nodes() { if [ "$slices" = 1 ]; then echo "$name"; else for ((i = 0; i < slices; i++)); do echo "$name-$i"; done; fi; }

# A command on every host of every slice, at the same time; fails if it fails on any.
everywhere() {
    local node jobs=() failed=0
    for node in $(nodes); do
        change compute tpus tpu-vm ssh "$node" "${where[@]}" --worker all --command "$1" &
        jobs+=($!)
        [ -z "$dry" ] || wait "${jobs[-1]}"
    done
    for job in "${jobs[@]}"; do wait "$job" || failed=1; done
    return "$failed"
}

accelerator() {
    case $type in
        v5e-*) echo "v5litepod-${type#v5e-} v2-alpha-tpuv5-lite" ;;
        v5litepod-*) echo "$type v2-alpha-tpuv5-lite" ;;
        v5p-*) echo "$type v2-alpha-tpuv5" ;;
        v6e-*) echo "$type v2-alpha-tpuv6e" ;;
        v4-*) echo "$type tpu-ubuntu2204-base" ;;
        '') die "give --type, such as --type v6e-16" ;;
        *) die "the type '$type' is unknown; known are v4-N, v5e-N, v5p-N, v6e-N (Ironwood, tpu7x, has no TPU VM interface: it needs GKE)" ;;
    esac
}

create() {
    local now kind runtime shape
    kind=$(accelerator) || exit
    read -r kind runtime <<<"$kind"
    now=$(state)
    case $now in
        ACTIVE) say "$name is there"; return ;;
        FAILED | SUSPENDED | SUSPENDING)
            say "$name is $now: deleting it, and asking again"
            change compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
            now=NONE
            ;;
    esac
    if [ "$now" = NONE ]; then
        shape=(--node-id "$name")
        [ "$slices" = 1 ] || shape=(--node-count "$slices" --node-prefix "$name")
        change compute tpus queued-resources create "$name" "${where[@]}" "${shape[@]}" --accelerator-type "$kind" \
            --runtime-version "${version:-$runtime}" ${tier[@]+"${tier[@]}"}
    fi
    [ -z "$dry" ] || return 0
    while now=$(state); [ "$now" != ACTIVE ]; do
        case $now in FAILED | SUSPENDED | NONE) die "$name is $now: 'gcloud compute tpus queued-resources describe $name --zone $zone' says why" 1 ;; esac
        say "$name is $now"
        sleep "$period"
    done
    say "$name is there"
}

setup() {
    local archive node
    archive=$(mktemp --suffix .tar.gz)
    # tracked files as they are now, and new ones that git does not ignore
    (cd "$root" && git ls-files -coz --exclude-standard | tar --null --ignore-failed-read -czf "$archive" -T - 2>/dev/null) || die "could not pack $root" 1
    for node in $(nodes); do
        change compute tpus tpu-vm scp "$archive" "$node:minllm.tar.gz" "${where[@]}" --worker all
    done
    # The images come with an older Python than minllm's 3.12; uv brings one without root.
    everywhere "set -e; mkdir -p $folder && tar -xzf minllm.tar.gz -C $folder && export PATH=\$HOME/.local/bin:\$PATH
        command -v python3.12 >/dev/null || { python3 -m pip install --user -q uv && uv python install -q 3.12; }
        cd $folder && MINLLM_ACCELERATOR=tpu scripts/run train --help >/dev/null
        ${bucket:+.venv/bin/python -m pip install -q -c constraints.txt gcsfs}"
    rm -f "$archive"
    say "$name is set up"
}

start() {
    local arguments inner
    [ $# -gt 0 ] || die "nothing to run: scripts/tpu_vm.sh run $name ... -- --config configs/NAME.yaml"
    printf -v arguments ' %q' "$@" ${bucket:+"checkpoints.folder=$bucket/$name" "compilation_cache=$bucket/$name/programs"}
    # The trap lets the shell outlive a SIGTERM to the whole group, and write down how the run ended.
    printf -v inner %q "trap : TERM; scripts/run train --cluster$arguments; echo \$? > logs/$name.exit"
    # One run a host: a second start finds the first. `status` and --keep read what the run leaves behind.
    everywhere "cd $folder && mkdir -p logs && export PATH=\$HOME/.local/bin:\$PATH
        if [ -f logs/$name.pid ] && kill -0 \$(cat logs/$name.pid) 2>/dev/null; then echo \$(hostname): $name runs already; exit 0; fi
        rm -f logs/$name.exit
        nohup setsid bash -c $inner >> logs/$name.log 2>&1 < /dev/null &
        echo \$! > logs/$name.pid"
}

# What the hosts say of the run: "running", or its exit status, one word a host.
report() {
    everywhere "cd $folder 2>/dev/null && if [ -f logs/$name.exit ]; then cat logs/$name.exit
        elif [ -f logs/$name.pid ] && kill -0 \$(cat logs/$name.pid) 2>/dev/null; then echo running; else echo none; fi" 2>/dev/null
}

keep() {
    local said
    while sleep "$period"; do
        if [ "$(state)" != ACTIVE ]; then
            say "$name is gone (preempted?): again from its newest checkpoint"
        elif ! said=$(report); then
            say "not every host of $name answers"
            continue        # the state will say so when it is lost
        elif grep -qx running <<<"$said"; then
            continue
        elif ! grep -qvx 0 <<<"$said"; then
            say "the run is over"
            return 0
        elif grep -qxE '75|none|129|13[0-9]|143' <<<"$said"; then
            say "a host was lost (exit statuses: $(tr '\n' ' ' <<<"$said")): again from the newest checkpoint"
        else
            die "the run failed (exit statuses: $(tr '\n' ' ' <<<"$said")); see scripts/tpu_vm.sh logs $name" 1
        fi
        create && setup && start "$@" || say "that did not work; trying again in $period s"
    done
}

case $command in
    create) create ;;
    setup) setup ;;
    run)
        [ -z "$keep" ] || accelerator >/dev/null    # it will have to create: say now what is missing
        start "$@"
        say "started; see it with: scripts/tpu_vm.sh logs $name"
        if [ -n "$keep" ] && [ -z "$dry" ]; then keep "$@"; fi
        ;;
    status)
        say "$name: $(state)"
        everywhere "cd $folder 2>/dev/null && printf '%s: ' \$(hostname) && if [ -f logs/$name.exit ]; then echo ended with \$(cat logs/$name.exit)
            elif [ -f logs/$name.pid ] && kill -0 \$(cat logs/$name.pid) 2>/dev/null; then tail -n 1 logs/$name.log; else echo no run; fi"
        ;;
    logs) everywhere "tail -n 40 $folder/logs/$name.log | sed \"s/^/\$(hostname): /\"" ;;
    stop)
        everywhere "cd $folder 2>/dev/null && [ -f logs/$name.pid ] && kill -TERM -- -\$(cat logs/$name.pid) 2>/dev/null
            for i in \$(seq 60); do [ -f $folder/logs/$name.exit ] && break; [ -f $folder/logs/$name.pid ] || break; sleep 1; done; true" || true
        [ -z "$run_only" ] || exit 0
        if [ "$(state)" = NONE ] && [ -z "$dry" ]; then say "there is no $name"; exit 0; fi
        change compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
        ;;
esac
