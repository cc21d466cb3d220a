#!/usr/bin/env bash
# Installs the image of an offline bundle, without a network: verifies its sums, loads it, starts it once.
#
#   FROM   the archive written by make save, or the folder it was unpacked to (default: this one)
set -euo pipefail
here=$PWD
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh
require_engine

from=${FROM:-.}
[[ $from == . || $from == /* ]] || from=$here/$from
if [[ -f $from ]]; then # an archive: unpacked next to it
    [[ -f $from.sha256 ]] || die "$from.sha256 is missing -> copy it too"
    (cd "$(dirname -- "$from")" && sha256sum --quiet --check "$from.sha256" >&2) ||
        die "$from does not match its sha256 sum -> copy it again"
    tar --extract --no-same-owner --file "$from" --directory "$(dirname -- "$from")"
    from=${from%.tar}
fi
[[ -f $from/SHA256SUMS && -f $from/image.tar.gz ]] ||
    die "$from has no image.tar.gz and SHA256SUMS -> set FROM= to the archive written by make save"
(cd "$from" && sha256sum --quiet --check SHA256SUMS >&2) || die "$from is incomplete or damaged (see above) -> copy it again"
version=$(<"$from/VERSION")

loaded=$("$docker" load --quiet --input "$from/image.tar.gz") || die "the engine could not load $from/image.tar.gz"
image=${loaded##*: }
[[ $image == "$name:$version-"* ]] || die "$from/image.tar.gz holds $image, expected $name:$version"
# The name of an image built by emulation ends with its architecture, which is not needed here.
built=$image image=${image%-a??64}
[[ $built == "$image" ]] || "$docker" tag "$built" "$image"
said=$("$docker" run --rm --network none "$image" openpangu-sft --version) || die "$image does not start"
[[ $said == "$version" ]] || die "$image is version $said, expected $version"
printf 'load: %s works -> run make in %s to list the stages\n' "$image" "$from" >&2
