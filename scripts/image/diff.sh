#!/usr/bin/env bash
# Builds an image twice without cached layers and compares the two file trees: content, mode, owner, time and link of
# every entry. Packages may come from the builder's cache, by hash. The variables of make image apply.
#
#   TARGET   npu (the default) or cpu
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh

target=${TARGET:-npu}
require_engine
work=$(mktemp -d)
container=
trap 'rm -rf "$work"; [[ -z $container ]] || "$docker" rm "$container" >/dev/null' EXIT
for build in first second; do
    TAG=$name:diff-$target-$build IMAGE_FLAGS="--no-cache ${IMAGE_FLAGS:-}" scripts/image/build.sh
    container=$("$docker" create "$name:diff-$target-$build")
    "$docker" export "$container" | python3 scripts/image/tree.py >"$work/$build"
    "$docker" rm "$container" >/dev/null
    container=
done
"$docker" rmi "$name:diff-$target-second" >/dev/null
if ! diff "$work/first" "$work/second" >"$work/difference"; then
    head -n 40 "$work/difference"
    die "the two trees differ in $(grep -c '^[<>]' "$work/difference") lines (< first, > second)"
fi
"$docker" tag "$name:diff-$target-first" "$(local_image "$target")"
"$docker" rmi "$name:diff-$target-first" >/dev/null
printf 'image-diff: two builds, %d entries each, no difference\n' "$(wc -l <"$work/first")"
