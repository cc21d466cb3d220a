#!/usr/bin/env bash
# Pushes an image to a registry as TAG-ARCH and TAG-COMMIT-ARCH, where TAG names CANN, torch_npu and the chip (published_tag in
# names.sh). See docs/image.md on joining both architectures under one name. SBOM and provenance are signed with cosign if
# there is a key, otherwise attached with oras if it is installed.
#
#   REGISTRY       the destination: registry.example.org/team
#   TARGET         npu (the default) or cpu
#   ARCH           amd64 or arm64: of an image built with ARCH
#   COSIGN_KEY     a key for cosign: a file, env://NAME or the URI of a KMS; its password is COSIGN_PASSWORD
#   COSIGN_FLAGS   more options for cosign, which by default adds an entry to the public transparency log
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. scripts/image/names.sh

target=${TARGET:-npu}
require_target "$target"
require_arch
[[ -n ${REGISTRY:-} ]] || die 'REGISTRY is not given -> make push REGISTRY=registry.example.org/team'
[[ -z ${COSIGN_KEY:-} ]] || command -v cosign >/dev/null || die 'COSIGN_KEY is given and cosign is not installed -> install it'
require_engine
image=$(local_image "$target")
has_image "$image" || die "there is no image $image -> make image TARGET=$target"
label() { "$docker" image inspect --format "{{index .Config.Labels \"org.opencontainers.image.$1\"}}" "$image"; }
commit=$(label revision)
[[ $commit =~ ^[0-9a-f]{40}$ ]] ||
    die "$image was made from $commit, which cannot be looked up -> commit, make image TARGET=$target, and push again"
machine=$("$docker" image inspect --format '{{.Architecture}}' "$image")
repository=${REGISTRY%/}/$name
tag=$(published_tag "$target" "$(label base.name)")
for remote in "$repository:$tag-$machine" "$repository:$tag-${commit:0:12}-$machine"; do
    "$docker" tag "$image" "$remote"
    "$docker" push --quiet "$remote" || die "$remote could not be pushed (see above) -> docker login ${REGISTRY%%/*}?"
    printf 'push: %s\n' "$remote" >&2
done

# By digest, because a tag may move between two commands.
digest=$("$docker" image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$image" | grep -m 1 "^$repository@")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
copy_out "$image" "$work/" sbom.json provenance.json
if [[ -n ${COSIGN_KEY:-} ]]; then
    read -ra flags <<<"${COSIGN_FLAGS:-}"
    signed() { cosign "$1" --yes --key "$COSIGN_KEY" "${flags[@]}" "${@:2}" "$digest" >&2 || die "cosign could not $1 $digest (see above)"; }
    signed sign
    signed attest --type cyclonedx --predicate "$work/sbom.json"
    signed attest --type slsaprovenance1 --predicate "$work/provenance.json"
    printf 'push: signed %s, with SBOM and provenance\n' "$digest" >&2
elif command -v oras >/dev/null; then
    cd "$work" # oras keeps the given paths
    attach() { oras attach --artifact-type "$2" "$digest" "$1.json:application/json" >&2 || die "oras could not attach $1 to $digest (see above)"; }
    attach sbom application/vnd.cyclonedx+json
    attach provenance application/vnd.in-toto+json
    printf 'push: attached SBOM and provenance to %s, unsigned\n' "$digest" >&2
else
    printf 'push: SBOM and provenance are in the image and in dist/, not attached -> give COSIGN_KEY, or install oras\n' >&2
fi
