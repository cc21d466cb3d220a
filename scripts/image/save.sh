#!/usr/bin/env bash
# Writes an offline bundle: one archive in dist/ with an image and everything needed to use it, and its sha256 sum.
#
#   TARGET   npu (the default) or cpu
#   DIST     the output directory (dist); temporarily needs about three times the image's compressed size
#   ARCH     amd64 or arm64: of an image built with ARCH
#   LEVEL    compression level of gzip, 1 to 9 (6)
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh

target=${TARGET:-npu}
require_target "$target"
require_arch
[[ ${LEVEL:-6} == [1-9] ]] || die "LEVEL=$LEVEL is not a number from 1 to 9 -> omit it for 6"
require_engine
image=$(local_image "$target")
has_image "$image" || die "there is no image $image -> make image TARGET=$target"
commit=$("$docker" image inspect --format '{{index .Config.Labels "org.opencontainers.image.revision"}}' "$image")
[[ $commit != *-changed ]] || printf 'save: %s has uncommitted changes\n' "$image" >&2
machine=$("$docker" image inspect --format '{{.Architecture}}' "$image")
dist=${DIST:-dist}
mkdir -p "$dist"
bundle=$name-$version-$target-$machine
staging=$(mktemp -d "$dist/.$bundle.XXXXXX")
trap 'rm -rf "$staging"' EXIT
folder=$staging/$bundle
mkdir -p "$folder/scripts/image"

compress=(gzip -n)
command -v pigz >/dev/null && compress=(pigz -n) # the same format, on all cores
"$docker" save "$image" | "${compress[@]}" "-${LEVEL:-6}" >"$folder/image.tar.gz"
copy_out "$image" "$folder/" versions.json sbom.json app/recipes
cp Makefile docker-compose.yml LICENSE "$folder/"
cp scripts/run.sh scripts/npus.sh scripts/compose.sh scripts/targets.awk "$folder/scripts/"
cp scripts/image/names.sh scripts/image/load.sh "$folder/scripts/image/"
sed -e "s/@VERSION@/$version/g; s/@TARGET@/$target/g; s/@COMMIT@/$commit/g; s/@MACHINE@/$machine/g" \
    scripts/image/bundle.md >"$folder/README.md"
printf '%s\n' "$version" >"$folder/VERSION"
(cd "$folder" && find . -type f ! -name SHA256SUMS -printf '%P\0' | sort -z | xargs -0 sha256sum >"$staging/sums" && mv "$staging/sums" SHA256SUMS)

# Not compressed again: nearly all of it is the compressed image.
tar --create --file "$staging/$bundle.tar" --directory "$staging" --owner 0 --group 0 --sort name "$bundle"
(cd "$staging" && sha256sum "$bundle.tar" >"$bundle.tar.sha256")
sync "$staging/$bundle.tar"
mv "$staging/$bundle.tar" "$staging/$bundle.tar.sha256" "$dist/"
printf 'save: %s, %sB -> copy both files; at the destination: sha256sum -c %s.tar.sha256 && tar -xf %s.tar && cd %s && make load\n' \
    "$dist/$bundle.tar" "$(stat -c %s "$dist/$bundle.tar" | numfmt --to=si)" "$bundle" "$bundle" "$bundle" >&2
