#!/usr/bin/env bash
# Packs an image with what is needed to use it where there is no network: one archive in dist/, and its sum beside it.
#
#   TARGET   npu (the default) or cpu
#   DIST     where the archive goes (dist); about three times the image's compressed size is needed there for a while
#   ARCH     amd64 or arm64: an image that was built with it
#   LEVEL    how much gzip compresses, 1 to 9 (6)
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh

target=${TARGET:-npu}
require_target "$target"
require_arch
[[ ${LEVEL:-6} == [1-9] ]] || die "LEVEL=$LEVEL is no number from 1 to 9 -> leave it out for 6"
require_engine
image=$(local_image "$target")
has_image "$image" || die "there is no image $image -> make image TARGET=$target"
commit=$("$docker" image inspect --format '{{index .Config.Labels "org.opencontainers.image.revision"}}' "$image")
[[ $commit != *-changed ]] || printf 'save: %s holds changes that are in no commit\n' "$image" >&2
machine=$("$docker" image inspect --format '{{.Architecture}}' "$image")
dist=${DIST:-dist}
mkdir -p "$dist"
bundle=$name-$version-$target-$machine
staging=$(mktemp -d "$dist/.$bundle.XXXXXX")
container=
trap 'rm -rf "$staging"; [[ -z $container ]] || "$docker" rm "$container" >/dev/null' EXIT
folder=$staging/$bundle
mkdir -p "$folder/scripts/image"

compress=(gzip -n)
command -v pigz >/dev/null && compress=(pigz -n) # the same format, on all cores
"$docker" save "$image" | "${compress[@]}" "-${LEVEL:-6}" >"$folder/image.tar.gz"
container=$("$docker" create "$image")
for file in versions sbom; do "$docker" cp "$container:/opt/openpangu/$file.json" "$folder/$file.json" >/dev/null; done
"$docker" cp "$container:/opt/openpangu/app/recipes" "$folder/recipes" >/dev/null
cp Makefile docker-compose.yml LICENSE "$folder/"
cp scripts/run.sh scripts/npus.sh scripts/compose.sh scripts/targets.awk "$folder/scripts/"
cp scripts/image/names.sh scripts/image/load.sh "$folder/scripts/image/"
sed -e "s/@VERSION@/$version/g; s/@TARGET@/$target/g; s/@COMMIT@/$commit/g; s/@MACHINE@/$machine/g" \
    scripts/image/handover.md >"$folder/README.md"
printf '%s\n' "$version" >"$folder/VERSION"
(cd "$folder" && find . -type f ! -name SHA256SUMS -printf '%P\0' | sort -z | xargs -0 sha256sum >"$staging/sums" && mv "$staging/sums" SHA256SUMS)

# Not compressed again: all but nothing of it is the image.
tar --create --file "$staging/$bundle.tar" --directory "$staging" --owner 0 --group 0 --sort name "$bundle"
(cd "$staging" && sha256sum "$bundle.tar" >"$bundle.tar.sha256")
sync "$staging/$bundle.tar"
mv "$staging/$bundle.tar" "$staging/$bundle.tar.sha256" "$dist/"
printf 'save: %s, %sB -> take both files along; there: sha256sum -c %s.tar.sha256 && tar -xf %s.tar && cd %s && make load\n' \
    "$dist/$bundle.tar" "$(stat -c %s "$dist/$bundle.tar" | numfmt --to=si)" "$bundle" "$bundle" "$bundle" >&2
