#!/usr/bin/env bash
# Runs a stage in the container image or on this machine, the same way.
#
#   run.sh openpangu-sft ARGUMENTS…   or another program of the image: run.sh bash
#
#   RUNTIME       docker or host (docker, if an engine answers and has the image)
#   TARGET        which image: npu or cpu (npu on a host with NPUs)
#   NPUS          which NPUs: 0,1,2,3 (all)
#   CACHE         directory mounted at /cache (/cache)
#   MAKE_OPTIONS  names of the options that the Makefile gives as OPENPANGU_RECIPE and so on: RECIPE SET
#   DOCKER_FLAGS  more options for docker run: -v /models:/models:ro
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
here=$(pwd -P) # what .. is relative to, in the container too
CDPATH='' cd -- "$root"
. scripts/image/names.sh
. scripts/npus.sh

# Sets image: this version's for this host, or the other one if only that exists.
choose_image() {
    local targets=(cpu npu) target
    ! has_npus || targets=(npu cpu)
    [[ -z ${TARGET:-} ]] || targets=("$TARGET")
    for target in "${targets[@]}"; do
        require_target "$target"
        image=$name:$version-$target
        ! has_image "$image" || return 0
    done
    image=$name:$version-${targets[0]}
    return 1
}

runtime=${RUNTIME:-}
case $runtime in
'')
    runtime=host
    if engine_answers && choose_image; then runtime=docker; fi
    ;;
docker)
    require_engine
    choose_image || die "there is no image $image -> run make image TARGET=${image##*-}, or make load in an offline bundle"
    ;;
host) ;;
*) die "RUNTIME=$runtime is neither docker nor host -> choose one of them" ;;
esac

if [[ $runtime == host ]]; then
    [[ -f scripts/setup.sh ]] || die "this folder is an offline bundle and has no code -> use RUNTIME=docker"
    scripts/setup.sh
    bin=${VENV:-.venv}/bin
    [[ $bin == /* ]] || bin=$root/$bin
    export PATH="$bin:$PATH"
    # torch 2.1.0's OpenBLAS for aarch64 collides with OpenMP
    [[ $HOSTTYPE != aarch64 ]] || export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
    CDPATH='' cd -- "$here"
    exec "$@"
fi

# Paths mean the same in the container: this directory, /cache, and every other path in an argument are mounted.
mounts=("$here")
mount() { # <absolute path>
    local path=$1 mounted
    for mounted in /cache "${mounts[@]}"; do
        [[ $path/ != "$mounted"/* ]] || return 0
    done
    [[ -d $path ]] || path=$(dirname -- "$path")
    [[ -d $path ]] || die "$path does not exist, so it cannot be mounted -> create it first"
    case $path in
    / | /bin | /dev | /etc | /home | /lib* | /opt | /proc | /root | /run | /sbin | /sys | /tmp | /usr | /var)
        die "$1: $path is not mounted into a container -> use an existing directory below it"
        ;;
    esac
    mounts+=("$path")
}
# Variables that a container needs: options, and what several machines and the libraries between them use.
read -ra options <<<"${MAKE_OPTIONS:-}"
mapfile -t variables < <(compgen -e | grep -E '^(MASTER_ADDR|MASTER_PORT|NNODES|NODE_RANK|OMP_NUM_THREADS|OPENPANGU_API_KEY|NO_COLOR|TERM|(GLOO|TP)_SOCKET_IFNAME|(HCCL|HF|WANDB|SWANLAB)_.*)$')
given=() sets=()
for option in "${options[@]}"; do
    variable=OPENPANGU_$option
    variables+=("$variable")
    case $option in
    SET) read -rd '' -a sets <<<"$OPENPANGU_SET" || true ;;
    PROMPT | SYSTEM) ;; # texts
    *) given+=("=${!variable}") ;;
    esac
done
for argument in "$@" "${given[@]}" "${sets[@]}"; do
    [[ $argument != --@(prompt|system)=* ]] || continue
    path=${argument#--set=}
    [[ $path == [/.]* ]] || path=${path#*=}
    case $path in
    /*) ;;
    .. | ../* | */.. | */../*) path=$here/$path ;;
    *) continue ;; # below this directory, or not a path
    esac
    mount "$(realpath --canonicalize-missing --no-symlinks -- "$path")"
done
bind() { # <path on this host> <path in the container>: --volume does not allow colons; CSV quoting allows commas
    flags+=(--mount "type=bind,\"source=${1//\"/\"\"}\",\"target=${2//\"/\"\"}\"")
}

flags=(--rm --init --ipc host --network host --stop-timeout 600 --workdir "$here")
flags+=(--env "HOST_UID=$(id -u)" --env "HOST_GID=$(id -g)")
# recorded in the run's provenance
flags+=(--env "OPENPANGU_SFT_IMAGE=$image $("$docker" image inspect "$image" --format '{{.Id}}')")
for path in "${mounts[@]}"; do bind "$path" "$path"; done
cache=${CACHE:-/cache}
[[ $cache == /* ]] || cache=$here/$cache
if [[ -d $cache ]]; then bind "$cache" /cache; elif [[ -n ${CACHE:-} ]]; then
    die "CACHE=$cache does not exist -> create it, and put the data and the checkpoint into it"
fi
for variable in "${variables[@]}"; do flags+=(--env "$variable"); done
if [[ -t 0 && -t 1 ]]; then flags+=(--interactive --tty); elif [[ ! -t 0 ]]; then flags+=(--interactive); fi
if [[ $image == *-npu ]] && has_npus; then
    find_npus
    for device in "${npu_devices[@]}"; do flags+=(--device "$device"); done
    for path in "${npu_mounts[@]}"; do flags+=(--volume "$path:ro"); done
    [[ -z $npu_visible ]] || flags+=(--runtime ascend --env "ASCEND_VISIBLE_DEVICES=$npu_visible")
fi
read -ra more <<<"${DOCKER_FLAGS:-}"
printf 'in %s\n' "$image" >&2
exec "$docker" run "${flags[@]}" "${more[@]}" "$image" "$@"
