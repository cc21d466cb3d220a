#!/usr/bin/env bash
# Finds by which digest the registries have the base images today, and writes that into locks/bases.txt, which make image
# begins with. Pulls them: what counts is what this engine gets.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh
require_engine

file=locks/bases.txt
trap 'rm -f "$file.new"' EXIT
{
    echo '# Made by make lock-base: the images that make image begins with, by digest.'
    for argument in BASE CPU_BASE BUILD_BASE; do
        tag=${!argument:-$(sed -n "s/^ARG $argument=//p" Dockerfile)}
        "$docker" pull --quiet "$tag" >&2 || die "$tag cannot be had -> name another one with $argument="
        digest=$("$docker" image inspect --format '{{index .RepoDigests 0}}' "$tag")
        printf '%s %s@%s\n' "$argument" "${tag%@*}" "${digest##*@}"
    done
} >"$file.new"
mv "$file.new" "$file"
cat "$file" >&2
