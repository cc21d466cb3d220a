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

engine_answers() { "$docker" version --format '{{.Server.Version}}' >/dev/null 2>&1; }
require_engine() {
    engine_answers ||
        die "no Docker engine answers ('$docker version' says why) -> install and start one, or name its client with DOCKER="
}
has_image() { "$docker" image inspect "$1" >/dev/null 2>&1; }
require_target() {
    [[ $1 == npu || $1 == cpu ]] || die "TARGET=$1 is neither npu nor cpu -> take one of them"
}
