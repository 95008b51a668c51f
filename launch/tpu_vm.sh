#!/usr/bin/env bash
# One command on every worker of a Cloud TPU slice. From the repository root:
#   export NAME=jaxrl ZONE=us-central1-a TYPE=v5litepod-16
#   launch/tpu_vm.sh create          requests the slice (SPOT=1 for a spot one); it waits in Google's queue
#   launch/tpu_vm.sh status          until it is ACTIVE
#   launch/tpu_vm.sh install         copies the committed tree (git HEAD) and installs it, on all workers
#   launch/tpu_vm.sh run train configs/arithmetic.yaml --mesh.fsdp 16
#   launch/tpu_vm.sh stop            SIGTERM to all workers: they save and exit 75; `run` with the same command resumes
#   launch/tpu_vm.sh delete
set -euo pipefail

: "${NAME:?name of the TPU, for example jaxrl}" "${ZONE:?zone, for example us-central1-a}"
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # must match TYPE, see Google's table of runtime versions
DIRECTORY=jaxrl_llm                     # in the home directory of each worker

on_all_workers() { # on_all_workers COMMAND: one shell command line
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

create() {
    local options=()
    if [ "${SPOT:-0}" = 1 ]; then options+=(--spot); fi
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${options[@]+"${options[@]}"}
}

status() {
    gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format="value(state.state)"
}

install() {
    local archive
    archive=$(mktemp --suffix=.tar.gz)
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:jaxrl_llm.tar.gz" --zone="$ZONE" --worker=all
    rm "$archive"
    # The v5e image is Ubuntu 22.04 with Python 3.10, too old: uv installs Python 3.12.
    on_all_workers "set -e; mkdir -p $DIRECTORY; tar -xzf jaxrl_llm.tar.gz -C $DIRECTORY; cd $DIRECTORY
        python3 -m pip install --quiet --user uv
        [ -d .venv ] || ~/.local/bin/uv venv --seed --python 3.12 .venv
        .venv/bin/pip install --quiet -c constraints.txt -e '.[tpu]'"
}

run() {
    local arguments
    printf -v arguments ' %q' "$@"
    on_all_workers "cd $DIRECTORY && exec env JAXRL_DISTRIBUTED=1 .venv/bin/jaxrl$arguments"
}

stop() {
    # The bracket keeps the pattern from matching the shell that runs it.
    on_all_workers "pkill -TERM -f '[.]venv/bin/jaxrl' || true"
}

delete() {
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

action=${1:?one of create, status, install, run, stop, delete}
shift
case $action in
    create | status | install | stop | delete) "$action" ;;
    run) run "${@:?nothing to run: for example train configs/arithmetic.yaml}" ;;
    *) echo "no action '$action': create, status, install, run, stop or delete" >&2 && exit 2 ;;
esac
