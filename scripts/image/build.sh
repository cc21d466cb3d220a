#!/usr/bin/env bash
# Builds the image openpangu-sft:VERSION-TARGET from this commit, and puts beside it, in dist/, what it consists of.
#
#   TARGET       npu (the default) or cpu
#   BASE         the image to begin with
#   BUILD_BASE   an image with compilers, no newer than the base: used where the base has no CPython 3.9, and for npu
#   TORCH        cpu: PyTorch's CPU build, from TORCH_INDEX; pypi: PyPI's, which on x86-64 brings CUDA's libraries
#   PYPI_INDEX, TORCH_INDEX, PYTHON_URL   package indexes and the archive of Python's source, or mirrors of them
#   CA           a file of certificates to trust beside the base's (SSL_CERT_FILE); it does not get into the image
#   IMAGE_FLAGS  more options for docker build: --no-cache
# Proxies are taken from HTTP_PROXY, HTTPS_PROXY and NO_PROXY, as docker build does by itself.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh

target=${TARGET:-npu}
require_target "$target"
require_engine
commit=$(git rev-parse HEAD 2>/dev/null) || die "this is no git clone, so the image could not say what it was made of -> take a clone"
# Of files that are not committed the image would say nothing.
[[ -z $(git status --porcelain) ]] || commit+=-changed
if [[ $target == npu ]]; then
    [[ -f .sources/manifest.json ]] || die "the upstream sources are not there -> run make sources"
else
    mkdir -p .sources # the builder wants the folder, and puts nothing of it into this image
fi

pinned() { # <the base of this target, by digest where make lock-base has found it>
    [[ ! -f locks/bases.txt ]] || sed -n "s/^$1 //p" locks/bases.txt
}
base_argument=BASE python_argument=PYTHON_FROM
[[ $target == npu ]] || base_argument=CPU_BASE python_argument=CPU_PYTHON_FROM
base=${BASE:-$(pinned "$base_argument")}
base=${base:-$(sed -n "s/^ARG $base_argument=//p" Dockerfile)}
build_base=${BUILD_BASE:-$(pinned BUILD_BASE)}

# Its own CPython 3.9 is used as it is.
has_image "$base" || "$docker" pull "$base" || die "the base $base cannot be had -> name another one with BASE="
python_from=source
if "$docker" run --rm --interactive --entrypoint /bin/sh "$base" -s /tmp/python \
    <scripts/image/python_base.sh >/dev/null 2>&1; then python_from=base; fi

arguments=(--build-arg "$base_argument=$base" --build-arg "$python_argument=$python_from")
[[ -z $build_base ]] || arguments+=(--build-arg "BUILD_BASE=$build_base")
for variable in TORCH PYPI_INDEX TORCH_INDEX PYTHON_URL PYTHON_SHA256; do
    [[ -z ${!variable:-} ]] || arguments+=(--build-arg "$variable=${!variable}")
done
for variable in HTTP_PROXY HTTPS_PROXY NO_PROXY; do # values of these that Docker takes from the environment
    [[ -z ${!variable:-} ]] || arguments+=(--build-arg "$variable")
done
ca=${CA:-${SSL_CERT_FILE:-}}
[[ -z $ca ]] || arguments+=(--secret "id=ca,src=$ca")
read -ra flags <<<"${IMAGE_FLAGS:-}"

# What people look for in a label; all of it is in versions.json.
stack=$(sed -n 's/^\(torch\|torch-npu\|transformers\|numpy\)==\([^ ]*\).*/\1 \2/p' "locks/torch-${TORCH:-cpu}.txt" "locks/image-$target.txt" |
    sort -u | paste -sd, | sed 's/,/, /g')
[[ $target == cpu ]] || stack+=$(sed -n 's/^\[\(.*\)\]$/, \1/p; s/^commit = "\(.\{12\}\).*/ \1/p' patches/upstream.toml | tr -d '\n')

tag=${TAG:-$name:$version-$target}
DOCKER_BUILDKIT=1 "$docker" build --target "$target" "${flags[@]}" "${arguments[@]}" \
    --build-arg "COMMIT=$commit" --build-arg "VERSION=$version" --build-arg "STACK=$stack" \
    --build-arg "SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)" --tag "$tag" .

mkdir -p dist
container=$("$docker" create "$tag")
trap '"$docker" rm "$container" >/dev/null' EXIT
for file in versions sbom; do
    "$docker" cp "$container:/opt/openpangu/$file.json" "dist/$name-$version-$target.$file.json" >/dev/null
done
printf 'image: %s, %s of commit %s; what it consists of: dist/%s-%s-%s.{versions,sbom}.json\n' \
    "$tag" "$("$docker" image inspect --format '{{.Size}}' "$tag" | numfmt --to=si)B" "$commit" "$name" "$version" "$target" >&2
