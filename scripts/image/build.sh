#!/usr/bin/env bash
# Builds the image openpangu-sft:TARGET from this commit.
#
#   TARGET       cpu (the npu image is not there yet)
#   BASE         the image to begin with; it has CPython 3.9, or what is needed to build it
#   TORCH        cpu: PyTorch's CPU build, from TORCH_INDEX; pypi: PyPI's, which on x86-64 brings CUDA's libraries
#   PYPI_INDEX, TORCH_INDEX   package indexes or mirrors of them
#   CA           a file of certificates to trust beside the base's; it does not get into the image
#   IMAGE_FLAGS  more options for docker build: --no-cache
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

die() {
    printf 'image: %s\n' "$*" >&2
    exit 1
}

target=${TARGET:-cpu}
[[ $target == cpu ]] || die "TARGET=$target is not there yet; there is cpu"
docker=${DOCKER:-docker}
"$docker" version --format '{{.Server.Version}}' >/dev/null 2>&1 ||
    die "no Docker engine answers ('$docker version' says why): install and start one, or name its client with DOCKER="

arguments=()
for name in BASE TORCH PYPI_INDEX TORCH_INDEX; do
    [[ -z ${!name:-} ]] || arguments+=(--build-arg "$name=${!name}")
done
[[ -z ${CA:-} ]] || arguments+=(--secret "id=ca,src=$CA")
read -ra flags <<<"${IMAGE_FLAGS:-}"

# Of files that are not committed the image would say nothing.
changed=
[[ -z $(git status --porcelain 2>/dev/null) ]] || changed=-changed
commit=$(git rev-parse HEAD)$changed || die "this is no git clone, so the image could not say what it was made of"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' src/openpangu_sft/__init__.py)

DOCKER_BUILDKIT=1 "$docker" build --target "$target" "${flags[@]}" "${arguments[@]}" \
    --build-arg "COMMIT=$commit" --build-arg "VERSION=$version" \
    --build-arg "SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)" \
    --tag "openpangu-sft:$target" --tag "openpangu-sft:$version-$target" .
