#!/bin/sh
# Makes a tree the same for everybody who builds it: owner root, modes by kind, no bytecode, one time for all.
#
#   normalise.sh SECONDS DIRECTORY...
set -eu
seconds=$1
shift
find "$@" -type d -name __pycache__ -prune -exec rm -rf {} +
chown -hR 0:0 "$@"
find "$@" -type d -exec chmod 755 {} +
find "$@" -type f -perm -u+x -exec chmod 755 {} +
find "$@" -type f ! -perm -u+x -exec chmod 644 {} +
find "$@" -exec touch -h -d "@$seconds" {} +
