#!/usr/bin/env bash
# Pushes an image to a registry, under tags that say what it is: VERSION-TARGET-ARCH and VERSION-TARGET-COMMIT-ARCH.
# docs/image.md says how images of both machines become one name.
#
#   REGISTRY   where to: registry.example.org/team
#   TARGET     npu (the default) or cpu
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh

target=${TARGET:-npu}
require_target "$target"
[[ -n ${REGISTRY:-} ]] || die 'REGISTRY is not given -> make push REGISTRY=registry.example.org/team'
require_engine
image=$name:$version-$target
has_image "$image" || die "there is no image $image -> make image TARGET=$target"
commit=$("$docker" image inspect --format '{{index .Config.Labels "org.opencontainers.image.revision"}}' "$image")
[[ $commit =~ ^[0-9a-f]{40}$ ]] ||
    die "$image was made from $commit, which nobody can look up -> commit, make image TARGET=$target, and push again"
machine=$("$docker" image inspect --format '{{.Architecture}}' "$image")
for tag in "$version-$target-$machine" "$version-$target-${commit:0:12}-$machine"; do
    remote=${REGISTRY%/}/$name:$tag
    "$docker" tag "$image" "$remote"
    "$docker" push --quiet "$remote" || die "$remote could not be pushed (see above) -> docker login ${REGISTRY%%/*}?"
    printf 'push: %s\n' "$remote" >&2
done
