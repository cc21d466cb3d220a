"""Makes a file tree reproducible: owner root, modes by type, no bytecode, one timestamp.

In Python, because a base may lack `find`.

Run as: python normalise.py SECONDS DIRECTORY
"""

import os
import shutil
import stat
import sys
from pathlib import Path


def main(seconds, directory):
    for cache in list(Path(directory).rglob("__pycache__")):
        shutil.rmtree(cache)
    for folder, directories, files in os.walk(directory):
        for name in directories + files:
            normalise(Path(folder, name), int(seconds))
    normalise(Path(directory), int(seconds))


def normalise(path, seconds):
    os.chown(path, 0, 0, follow_symlinks=False)
    mode = path.lstat().st_mode
    if not stat.S_ISLNK(mode):
        path.chmod(0o755 if stat.S_ISDIR(mode) or mode & stat.S_IXUSR else 0o644)
    os.utime(path, (seconds, seconds), follow_symlinks=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
