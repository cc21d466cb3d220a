#!/usr/bin/env bash
# Builds the image openpangu-sft:VERSION-TARGET from this commit; its versions, SBOM and provenance go to dist/.
#
#   TARGET       npu (the default) or cpu
#   ARCH         amd64 or arm64: another architecture, emulated by binfmt and qemu; appended to the image's name
#   BASE         the base image
#   BUILD_BASE   an image with compilers, whose C library is not newer than the base's: for npu, and if the base has no CPython 3.9
#   TORCH        cpu: PyTorch's CPU build, from TORCH_INDEX; pypi: PyPI's, which on x86-64 includes CUDA libraries
#   PYPI_INDEX, TORCH_INDEX, PYTHON_URL   package indexes and Python's source archive, or mirrors of them
#   CA           a file of additional trusted certificates (SSL_CERT_FILE); not part of the image
#   IMAGE_FLAGS  more options for docker build: --no-cache
# HTTP_PROXY, HTTPS_PROXY and NO_PROXY apply, as in any docker build.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh

target=${TARGET:-npu}
require_target "$target"
require_arch
require_engine
platform=()
[[ -z ${ARCH:-} ]] || platform=(--platform "linux/$ARCH")
commit=$(git rev-parse HEAD 2>/dev/null) || die "this is not a git clone, so the image could not record its commit -> build in a clone"
[[ -z $(git status --porcelain) ]] || commit+=-changed
if [[ $target == npu ]]; then
    [[ -f .sources/manifest.json ]] || die "the upstream sources are not there -> run make sources"
else
    mkdir -p .sources # required by the builder, not used for this image
fi

base_argument=BASE python_argument=PYTHON_FROM
[[ $target == npu ]] || base_argument=CPU_BASE python_argument=CPU_PYTHON_FROM
base=$(base_of "$base_argument")
build_base=$(base_of BUILD_BASE)

pull() { # <base> <its variable>: unless the engine has it for this architecture
    local machine
    if machine=$("$docker" image inspect --format '{{.Architecture}}' "$1" 2>/dev/null) &&
        [[ ${ARCH:-$machine} == "$machine" ]]; then return; fi
    "$docker" pull "${platform[@]}" "$1" || die "cannot pull the base $1 -> choose another one with $2="
}
inside() { # <base> <command…>
    "$docker" run --rm --interactive "${platform[@]}" --entrypoint "$2" "$1" "${@:3}"
}

pull "$base" BASE
[[ -z ${ARCH:-} ]] || inside "$base" /bin/sh -c : ||
    die "$base does not start here (see above) -> to emulate $ARCH install qemu-user-static and binfmt-support"
# The base's own CPython 3.9 is used if there is one.
python_from=source
if inside "$base" /bin/sh -s /tmp/python <scripts/image/python_base.sh >/dev/null 2>&1; then python_from=base; fi
if [[ $target == npu || $python_from == source ]]; then
    pull "$build_base" BUILD_BASE
    ours=$(inside "$base" getconf GNU_LIBC_VERSION || true) theirs=$(inside "$build_base" getconf GNU_LIBC_VERSION || true)
    [[ $(printf '%s\n' "${theirs#glibc }" "${ours#glibc }" | sort -V | tail -n 1) == "${ours#glibc }" || -z $ours ]] ||
        die "$build_base has $theirs and $base $ours: programs compiled in the first would not start in the second -> use an older one, BUILD_BASE=docker.io/library/buildpack-deps:bullseye (glibc 2.31)"
fi

arguments=(--build-arg "$base_argument=$base" --build-arg "$python_argument=$python_from")
arguments+=(--build-arg "BUILD_BASE=$build_base")
for variable in TORCH PYPI_INDEX TORCH_INDEX PYTHON_URL PYTHON_SHA256; do
    [[ -z ${!variable:-} ]] || arguments+=(--build-arg "$variable=${!variable}")
done
for variable in HTTP_PROXY HTTPS_PROXY NO_PROXY; do # Docker takes their values from the environment
    [[ -z ${!variable:-} ]] || arguments+=(--build-arg "$variable")
done
ca=${CA:-${SSL_CERT_FILE:-}}
[[ -z $ca ]] || arguments+=(--secret "id=ca,src=$ca")
read -ra flags <<<"${IMAGE_FLAGS:-}"

published=$(published_tag "$target" "$base")
# The pairing of https://gitcode.com/Ascend/pytorch; Atlas 900 A3 needs newer versions.
[[ $published != *-cann*-torch_npu2.1.0.post8-* || $published == *-cann8.0.rc3-* ]] ||
    printf 'image: torch_npu 2.1.0.post8 is made for CANN 8.0.RC3, the base is %s -> see docs/image.md on how to change torch_npu\n' "$base" >&2

# A summary of versions.json, for the label.
stack=$(sed -n 's/^\(torch\|torch-npu\|transformers\|numpy\)==\([^ +]*\).*/\1 \2/p' "locks/torch-${TORCH:-cpu}.txt" "locks/image-$target.txt" |
    sort -u | paste -sd, | sed 's/,/, /g')
[[ $target == cpu ]] || stack+=$(sed -n 's/^\[\(.*\)\]$/, \1/p; s/^commit = "\(.\{12\}\).*/ \1/p' patches/upstream.toml | tr -d '\n')

tag=${TAG:-$(local_image "$target")}
DOCKER_BUILDKIT=1 "$docker" build --target "$target" "${platform[@]}" "${flags[@]}" "${arguments[@]}" \
    --build-arg "COMMIT=$commit" --build-arg "VERSION=$version" --build-arg "STACK=$stack" \
    --build-arg "SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)" --tag "$tag" .

mkdir -p dist
description=$name-$version-$target${ARCH:+-$ARCH}
copy_out "$tag" "dist/$description." versions.json sbom.json provenance.json
printf 'image: %s, %s of commit %s; contents: dist/%s.{versions,sbom,provenance}.json\n' \
    "$tag" "$("$docker" image inspect --format '{{.Size}}' "$tag" | numfmt --to=si)B" "$commit" "$description" >&2
