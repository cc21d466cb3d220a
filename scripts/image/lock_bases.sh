#!/usr/bin/env bash
# Pulls the base images and writes their current digests into locks/bases.txt, from which make image takes its bases.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh
require_engine

file=locks/bases.txt
trap 'rm -f "$file.new"' EXIT
{
    echo '# Made by make lock-base: the base images of make image, by digest.'
    for argument in BASE CPU_BASE BUILD_BASE; do
        tag=${!argument:-$(sed -n "s/^ARG $argument=//p" Dockerfile)}
        "$docker" pull --quiet "$tag" >&2 || die "cannot pull $tag -> choose another one with $argument="
        digest=$("$docker" image inspect --format '{{index .RepoDigests 0}}' "$tag")
        printf '%s %s@%s\n' "$argument" "${tag%@*}" "${digest##*@}"
    done
} >"$file.new"
mv "$file.new" "$file"
cat "$file" >&2
