#!/bin/bash
# Runs the container's command as the user who owns /cache, with CANN's environment where there is one. Of the base it needs
# bash alone; the rest is become_user.py.
#
#   HOST_UID, HOST_GID   another user than the owner of /cache
set -euo pipefail

# CANN's images set their environment in the entrypoint that this one replaces. Its files use variables that may not be set.
set +u
for environment in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do
    # shellcheck disable=SC1090
    [[ ! -f $environment ]] || . "$environment"
done
set -u

# The OpenBLAS of PyTorch 2.1.0 for aarch64 starts threads of its own inside OpenMP's: "may hang", it warns at every call.
[[ $HOSTTYPE != aarch64 ]] || export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}

say() { printf 'openpangu-sft: %s\n' "$*" >&2; }

# What would be met much later, and in other words.
if [[ -d /opt/openpangu/torch_npu ]]; then
    if [[ ! -e /dev/davinci_manager ]]; then
        say 'no NPU is to be seen in this container, so no training on one -> make mounts the NPUs of its host, and scripts/compose.sh writes them down for docker compose'
    elif ! problem=$(/opt/openpangu/venv/bin/python -c 'import torch, torch_npu' 2>&1); then
        say "torch_npu does not import: ${problem##*$'\n'} -> it needs CANN (of this image's base) and the host's driver (/usr/local/Ascend/driver)"
    fi
fi

exec /opt/openpangu/venv/bin/python -IB /opt/openpangu/become_user.py "$@"
