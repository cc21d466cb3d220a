#!/bin/bash
# Runs the container's command as the owner of /cache, with CANN's environment if the base has it. It needs only bash from
# the base; the rest is become_user.py.
#
#   HOST_UID, HOST_GID   run as this user instead of the owner of /cache
set -euo pipefail

# This replaces the entrypoint in which CANN's images set their environment. CANN's files use variables that may be unset.
set +u
for environment in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do
    # shellcheck disable=SC1090
    [[ ! -f $environment ]] || . "$environment"
done
set -u

# The OpenBLAS of PyTorch 2.1.0 for aarch64 starts its own threads inside OpenMP's, and warns that it may hang.
[[ $HOSTTYPE != aarch64 ]] || export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}

say() { printf 'openpangu-sft: %s\n' "$*" >&2; }

# Report early what would otherwise fail later with a less helpful message.
if [[ -d /opt/openpangu/torch_npu ]]; then
    if [[ ! -e /dev/davinci_manager ]]; then
        say 'no NPU is visible in this container, so it cannot train on NPUs -> start it with make, which mounts the NPUs of the host; for docker compose run scripts/compose.sh once'
    elif ! problem=$(/opt/openpangu/venv/bin/python -c 'import torch, torch_npu' 2>&1); then
        say "torch_npu does not import: ${problem##*$'\n'} -> it needs CANN (of this image's base) and the host's driver (/usr/local/Ascend/driver)"
    fi
fi

exec /opt/openpangu/venv/bin/python -IB /opt/openpangu/become_user.py "$@"
