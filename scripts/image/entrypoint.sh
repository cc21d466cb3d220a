#!/bin/bash
# Starts what the container is asked for as the user whose files /cache holds, with Ascend's environment where there is one.
#
#   HOST_UID, HOST_GID   who that is (the owner of /cache)
set -euo pipefail

# These files use variables that may not be set.
set +u
for environment in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do
    # shellcheck disable=SC1090
    [[ ! -f $environment ]] || . "$environment"
done
set -u

uid=${HOST_UID:-$(stat -c %u /cache)}
gid=${HOST_GID:-$(stat -c %g /cache)}
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
