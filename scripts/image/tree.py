"""Lists the file tree of an image, read from `docker export` on standard input: one line per entry.

Type, mode, owner, time, sha256 or link target, path. Two builds of one commit must give the same list.

Run as: docker export CONTAINER | python3 tree.py
"""

import hashlib
import sys
import tarfile

# Created by the engine in every container.
MADE_BY_THE_ENGINE = {".dockerenv", "dev", "dev/console", "dev/pts", "dev/shm", "etc/hostname", "etc/hosts"}
MADE_BY_THE_ENGINE |= {"etc/mtab", "etc/resolv.conf", "proc", "sys", "etc"}


def main():
    lines = []
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        for entry in archive:
            name = entry.name.rstrip("/")
            if name in MADE_BY_THE_ENGINE:
                continue
            content = entry.linkname
            if entry.isfile():
                digest = hashlib.sha256()
                stream = archive.extractfile(entry)
                while block := stream.read(1 << 20):
                    digest.update(block)
                content = digest.hexdigest()
            kind = entry.type.decode()
            lines.append((name, f"{kind} {entry.mode:04o} {entry.uid}:{entry.gid} {entry.mtime} {content} {name}"))
    for _, line in sorted(lines):
        print(line)


if __name__ == "__main__":
    main()
