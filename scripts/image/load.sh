#!/usr/bin/env bash
# Brings up the image of a hand-over, without a network: checks its sums, loads it, starts it once.
#
#   FROM   the archive that make save has written, or the folder that it was unpacked to (this one)
set -euo pipefail
here=$PWD
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh
require_engine

from=${FROM:-.}
[[ $from == . || $from == /* ]] || from=$here/$from
if [[ -f $from ]]; then # an archive: it is unpacked beside itself
    [[ -f $from.sha256 ]] || die "$from.sha256 is not there -> take it along too"
    (cd "$(dirname -- "$from")" && sha256sum --quiet --check "$from.sha256" >&2) ||
        die "$from is not what its sum says -> copy it again"
    tar --extract --no-same-owner --file "$from" --directory "$(dirname -- "$from")"
    from=${from%.tar}
fi
[[ -f $from/SHA256SUMS && -f $from/image.tar.gz ]] ||
    die "$from holds no image.tar.gz and SHA256SUMS -> name what make save has written with FROM="
(cd "$from" && sha256sum --quiet --check SHA256SUMS >&2) || die "$from is not whole (see above) -> copy it again"
version=$(<"$from/VERSION")

loaded=$("$docker" load --quiet --input "$from/image.tar.gz") || die "the engine could not load $from/image.tar.gz"
image=${loaded##*: }
[[ $image == "$name:$version-"* ]] || die "$from/image.tar.gz holds $image, expected $name:$version"
# An image built by emulation has its machine in its name; on that machine it needs none.
built=$image image=${image%-a??64}
[[ $built == "$image" ]] || "$docker" tag "$built" "$image"
said=$("$docker" run --rm --network none "$image" openpangu-sft --version) || die "$image does not start"
[[ $said == "$version" ]] || die "$image is version $said, expected $version"
printf 'load: %s works -> make, in %s, lists what there is\n' "$image" "$from" >&2
