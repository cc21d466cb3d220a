#!/bin/bash
# Starts what the container is asked for as the user whose files /cache holds, with Ascend's environment where there is one.
#
#   HOST_UID, HOST_GID   who that is (the owner of /cache)
set -euo pipefail

# CANN's images set their environment in the entrypoint that this one replaces. Its files use variables that may not be set.
set +u
for environment in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do
    # shellcheck disable=SC1090
    [[ ! -f $environment ]] || . "$environment"
done
set -u

say() { printf 'openpangu-sft: %s\n' "$*" >&2; }

# What would be met much later, and in other words.
if [[ -d /opt/openpangu/torch_npu ]]; then
    if [[ ! -e /dev/davinci_manager ]]; then
        say 'no NPU is to be seen in this container, so no training on one -> make mounts the NPUs of its host, and scripts/compose.sh writes them down for docker compose'
    elif ! problem=$(python -c 'import torch, torch_npu' 2>&1); then
        say "torch_npu does not import: ${problem##*$'\n'} -> it needs CANN (of this image's base) and the host's driver (/usr/local/Ascend/driver)"
    fi
fi

uid=${HOST_UID:-$(stat -c %u /cache 2>/dev/null || echo 0)}
gid=${HOST_GID:-$(stat -c %g /cache 2>/dev/null || echo 0)}
if ((EUID != 0)) || ((uid == 0)); then
    exec "$@"
fi

# HCCL and others look the user up: a uid without an entry breaks them.
getent group "$gid" >/dev/null || echo "openpangu:x:$gid:" >>/etc/group
if ! entry=$(getent passwd "$uid"); then
    entry="openpangu:x:$uid:$gid::/home/openpangu:/bin/bash"
    echo "$entry" >>/etc/passwd
fi
HOME=$(cut -d: -f6 <<<"$entry")
USER=$(cut -d: -f1 <<<"$entry")
export HOME USER
mkdir -p "$HOME"
chown "$uid:$gid" "$HOME"

# The device files' group (HwHiAiUser), so that the NPUs can be opened.
groups=$gid
for device in /dev/davinci*; do
    [[ ! -e $device ]] || groups+=,$(stat -c %g "$device")
done
exec setpriv --reuid "$uid" --regid "$gid" --groups "$groups" --inh-caps=-all --no-new-privs -- "$@"
