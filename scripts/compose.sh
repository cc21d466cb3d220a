#!/usr/bin/env bash
# Writes this host's NPUs and driver into docker-compose.override.yml, which docker compose adds to docker-compose.yml.
#
#   NPUS   which NPUs: 0,1,2,3 (all)
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. scripts/image/names.sh
. scripts/npus.sh
file='docker-compose.override.yml'
mark='# Written by scripts/compose.sh for this host; run it again for other NPUs.'

[[ ! -e $file || $(head -n 1 "$file") == "$mark" ]] ||
    die "$file was not written by this script and is left as it is -> add what docs/image.md says, or move it away"
has_npus || die "this host has no NPU ($host_root/dev/davinci_manager) -> docker compose run cpu does not need this file"
find_npus
{
    printf '%s\nservices:\n' "$mark"
    for service in npu vllm; do
        printf '  %s:\n' "$service"
        if [[ -n $npu_visible ]]; then
            printf '    runtime: ascend\n    environment:\n      - ASCEND_VISIBLE_DEVICES=%s\n' "$npu_visible"
        else
            printf '    devices:\n'
            printf '      - "%s"\n' "${npu_devices[@]}"
            printf '    volumes:\n'
            printf '      - "%s:ro"\n' "${npu_mounts[@]}"
        fi
    done
} >"$file.new"
mv "$file.new" "$file"
printf 'compose: %s has NPUs %s\n' "$file" "${NPUS:-all}" >&2
