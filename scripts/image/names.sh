# shellcheck shell=bash disable=SC2034
# How images are called, and which engine has them. Sourced, in the repository's root or in a hand-over's.

die() {
    printf 'openpangu-sft: %s\n' "$*" >&2
    exit 1
}

docker=${DOCKER:-docker}
name=openpangu-sft
if [[ -f VERSION ]]; then version=$(<VERSION); else # of a hand-over
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' src/openpangu_sft/__init__.py)
fi

# A foreign machine's image, made by emulation, has a name of its own.
local_image() { printf '%s\n' "$name:$version-$1${ARCH:+-$ARCH}"; } # <target>

# The image to begin with: given, pinned by make lock-base, or the Dockerfile's.
base_of() { # <BASE, CPU_BASE or BUILD_BASE>
    local base=
    [[ $1 != BUILD_BASE ]] || base=${BUILD_BASE:-}
    [[ $1 == BUILD_BASE ]] || base=${BASE:-}
    [[ -n $base || ! -f locks/bases.txt ]] || base=$(sed -n "s/^$1 //p" locks/bases.txt)
    printf '%s\n' "${base:-$(sed -n "s/^ARG $1=//p" Dockerfile)}"
}

# What a registry calls an image, but for the machine: CANN, torch_npu and the chip are what users choose by. Tags of CANN's
# images are CANN-CHIP-SYSTEM-PYTHON.
published_tag() { # <target> <its base>
    local torch_npu cann=${2%@*}
    [[ $1 == npu ]] || { printf '%s\n' "$version-$1" && return; }
    torch_npu=$(sed -n 's/^torch-npu==\([^ ]*\).*/torch_npu\1/p' locks/image-npu.txt)
    if [[ $cann =~ :([0-9][^-:/]*)-([^-]+)-([^-]+)-py[0-9.]+$ ]]; then
        local system=-${BASH_REMATCH[3]}
        [[ $system != -ubuntu22.04 ]] || system=
        printf '%s\n' "$version-cann${BASH_REMATCH[1]%.beta1}-$torch_npu-${BASH_REMATCH[2]}$system"
    else
        printf '%s\n' "$version-$torch_npu-npu" # a base of one's own
    fi
}

engine_answers() { "$docker" version --format '{{.Server.Version}}' >/dev/null 2>&1; }
require_engine() {
    engine_answers ||
        die "no Docker engine answers ('$docker version' says why) -> install and start one, or name its client with DOCKER="
}
has_image() { "$docker" image inspect "$1" >/dev/null 2>&1; }
require_arch() {
    [[ ${ARCH:-amd64} == amd64 || ${ARCH:-arm64} == arm64 ]] || die "ARCH=$ARCH is neither amd64 nor arm64 -> take one of them"
}
require_target() {
    [[ $1 == npu || $1 == cpu ]] || die "TARGET=$1 is neither npu nor cpu -> take one of them"
}
