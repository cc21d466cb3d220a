# shellcheck shell=bash disable=SC2034
# Names of images, and the engine. Sourced, in the root of the repository or of an offline bundle.

die() {
    printf 'openpangu-sft: %s\n' "$*" >&2
    exit 1
}

docker=${DOCKER:-docker}
name=openpangu-sft
if [[ -f VERSION ]]; then version=$(<VERSION); else # VERSION: in an offline bundle
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' src/openpangu_sft/__init__.py)
fi

# The name of an image for another architecture ends with it.
local_image() { printf '%s\n' "$name:$version-$1${ARCH:+-$ARCH}"; } # <target>

# A base image: given, pinned by make lock-base, or the Dockerfile's default.
base_of() { # <BASE, CPU_BASE or BUILD_BASE>
    local base=
    [[ $1 != BUILD_BASE ]] || base=${BUILD_BASE:-}
    [[ $1 == BUILD_BASE ]] || base=${BASE:-}
    [[ -n $base || ! -f locks/bases.txt ]] || base=$(sed -n "s/^$1 //p" locks/bases.txt)
    printf '%s\n' "${base:-$(sed -n "s/^ARG $1=//p" Dockerfile)}"
}

# The tag in a registry, without the architecture. It names CANN, torch_npu and the chip, by which users choose an image. Tags
# of CANN's images are CANN-CHIP-SYSTEM-PYTHON.
published_tag() { # <target> <its base>
    local torch_npu cann=${2%@*}
    [[ $1 == npu ]] || { printf '%s\n' "$version-$1" && return; }
    torch_npu=$(sed -n 's/^torch-npu==\([^ ]*\).*/torch_npu\1/p' locks/image-npu.txt)
    if [[ $cann =~ :([0-9][^-:/]*)-([^-]+)-([^-]+)-py[0-9.]+$ ]]; then
        local system=-${BASH_REMATCH[3]}
        [[ $system != -ubuntu22.04 ]] || system=
        printf '%s\n' "$version-cann${BASH_REMATCH[1]%.beta1}-$torch_npu-${BASH_REMATCH[2]}$system"
    else
        printf '%s\n' "$version-$torch_npu-npu" # a custom base
    fi
}

engine_answers() { "$docker" version --format '{{.Server.Version}}' >/dev/null 2>&1; }
require_engine() {
    engine_answers ||
        die "no Docker engine answers ('$docker version' says why) -> install and start one, or name its client with DOCKER="
}
has_image() { "$docker" image inspect "$1" >/dev/null 2>&1; }
copy_out() ( # <image> <prefix> <file…>: files of /opt/openpangu, each to PREFIX and its name; a subshell, for the trap
    container=$("$docker" create ${ARCH:+--platform "linux/$ARCH"} "$1")
    trap '"$docker" rm "$container" >/dev/null' EXIT
    for file in "${@:3}"; do "$docker" cp "$container:/opt/openpangu/$file" "$2${file##*/}" >/dev/null; done
)
require_arch() {
    [[ ${ARCH:-amd64} == amd64 || ${ARCH:-arm64} == arm64 ]] || die "ARCH=$ARCH is neither amd64 nor arm64 -> choose one of them"
}
require_target() {
    [[ $1 == npu || $1 == cpu ]] || die "TARGET=$1 is neither npu nor cpu -> choose one of them"
}
