#!/bin/sh
# Links the base's own CPython 3.9 as DIRECTORY/bin/python3, if it can create environments (Debian's needs python3-venv).
#
#   python_base.sh DIRECTORY
set -eu
minor=3.9
for candidate in "python$minor" "/usr/local/python$minor"*/bin/"python$minor" python3; do
    found=$(command -v "$candidate" || true)
    if [ -n "$found" ] && [ "$("$found" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])')" = "$minor" ]; then
        mkdir -p "$1/bin"
        ln -s "$found" "$1/bin/python3"
        echo "python: the base's own, $("$found" -V), $found"
        exit
    fi
done
echo "python: this base has no CPython $minor" >&2
exit 1
