"""Runs a command as the owner of /cache, or as HOST_UID and HOST_GID. The last step of the entrypoint.

In Python, because a base may lack setpriv, getent or useradd (openEuler's minimal image does).

Run as: python -IB become_user.py COMMAND [ARGUMENT...]
"""

import ctypes
import grp
import os
import pwd
import signal
import sys
from pathlib import Path

PR_SET_NO_NEW_PRIVS = 38


def main(command):
    """Replaces this process; exits like a shell (127, 126) if the command cannot run."""
    cache = Path("/cache")
    owner = cache.stat() if cache.is_dir() else None
    uid = int(os.environ.get("HOST_UID") or (owner.st_uid if owner else 0))
    gid = int(os.environ.get("HOST_GID") or (owner.st_gid if owner else 0))
    if os.geteuid() == 0 and uid != 0:
        become(uid, gid)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores these two, which the command would inherit
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"openpangu-sft: {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


def become(uid, gid):
    """Switches to uid and gid, with the groups of the NPUs' device files (HwHiAiUser), irrevocably."""
    # HCCL and others look up the user and fail without an entry.
    try:
        grp.getgrgid(gid)
    except KeyError:
        append("/etc/group", f"openpangu:x:{gid}:")
    try:
        pwd.getpwuid(uid)
    except KeyError:
        append("/etc/passwd", f"openpangu:x:{uid}:{gid}::/home/openpangu:/bin/bash")
    entry = pwd.getpwuid(uid)
    os.environ.update(HOME=entry.pw_dir, USER=entry.pw_name)
    Path(entry.pw_dir).mkdir(parents=True, exist_ok=True)
    os.chown(entry.pw_dir, uid, gid)
    devices = {path.stat().st_gid for path in Path("/dev").glob("davinci*")}
    os.setgroups(sorted({gid} | devices))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        sys.exit("openpangu-sft: this kernel does not know no_new_privs -> Linux 3.5 or newer is needed")


def append(file, line):
    with Path(file).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
