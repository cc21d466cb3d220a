#!/usr/bin/env bash
# Runs a stage where it is to run: in the container image or on this machine, the same way.
#
#   run.sh openpangu-sft ARGUMENTS…   or another program of the image: run.sh bash
#
#   RUNTIME       docker or host (docker, where an engine answers and has the image)
#   TARGET        which image: npu or cpu (npu on a host with NPUs)
#   NPUS          which NPUs: 0,1,2,3 (all)
#   CACHE         the directory that is /cache inside (/cache)
#   DOCKER_FLAGS  more options for docker run: -v /models:/models:ro
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
here=$(pwd -P) # where .. leads up from, inside too
CDPATH='' cd -- "$root"
. scripts/image/names.sh
. scripts/npus.sh

# The image of this version for this host; of the two, the one that is there.
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
    choose_image || die "there is no image $image -> make image TARGET=${image##*-}, or make load of a hand-over, brings it"
    ;;
host) ;;
*) die "RUNTIME=$runtime is neither docker nor host -> take one of them" ;;
esac

if [[ $runtime == host ]]; then
    [[ -f scripts/setup.sh ]] || die "this folder is a hand-over and has no code -> only RUNTIME=docker runs here"
    scripts/setup.sh
    bin=${VENV:-.venv}/bin
    [[ $bin == /* ]] || bin=$root/$bin
    export PATH="$bin:$PATH"
    # torch 2.1.0's OpenBLAS for aarch64 collides with OpenMP
    [[ $HOSTTYPE != aarch64 ]] || export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
    CDPATH='' cd -- "$here"
    exec "$@"
fi

# Paths mean the same inside as here: this directory, /cache, and whatever else is named in an argument.
mounts=("$here")
mount() { # <an absolute path that a stage was given>
    local path=$1 mounted
    for mounted in /cache "${mounts[@]}"; do
        [[ $path/ != "$mounted"/* ]] || return 0
    done
    [[ -d $path ]] || path=$(dirname -- "$path")
    [[ -d $path ]] || die "$path is not there, so it cannot be mounted -> make it first"
    case $path in
    / | /bin | /dev | /etc | /home | /lib* | /opt | /proc | /root | /run | /sbin | /sys | /tmp | /usr | /var)
        die "$1: $path is not mounted into a container -> take a directory below it that is there"
        ;;
    esac
    mounts+=("$path")
}
for argument in "$@"; do
    [[ $argument != --prompt=* ]] || continue
    path=${argument#--set=}
    [[ $path == [/.]* ]] || path=${path#*=}
    case $path in
    /*) ;;
    .. | ../* | */.. | */../*) path=$here/$path ;;
    *) continue ;; # below this directory, or no path
    esac
    mount "$(realpath --canonicalize-missing --no-symlinks -- "$path")"
done
bind() { # <path of this host> <path inside>: not as --volume, which takes no colon; CSV, so that it takes a comma
    flags+=(--mount "type=bind,\"source=${1//\"/\"\"}\",\"target=${2//\"/\"\"}\"")
}

flags=(--rm --init --ipc host --network host --stop-timeout 600 --workdir "$here")
flags+=(--env "HOST_UID=$(id -u)" --env "HOST_GID=$(id -g)")
# what a run notes of where it was trained
flags+=(--env "OPENPANGU_SFT_IMAGE=$image $("$docker" image inspect "$image" --format '{{.Id}}')")
for path in "${mounts[@]}"; do bind "$path" "$path"; done
cache=${CACHE:-/cache}
[[ $cache == /* ]] || cache=$here/$cache
if [[ -d $cache ]]; then bind "$cache" /cache; elif [[ -n ${CACHE:-} ]]; then
    die "CACHE=$cache is not there -> make it, and put the data and the checkpoint into it"
fi
# What steers several machines and the libraries between them.
while IFS= read -r variable; do flags+=(--env "$variable"); done < <(
    compgen -e | grep -E '^(MASTER_ADDR|MASTER_PORT|NNODES|NODE_RANK|OMP_NUM_THREADS|NO_COLOR|TERM|(GLOO|TP)_SOCKET_IFNAME|HCCL_.*)$'
)
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
