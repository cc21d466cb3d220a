#!/bin/sh
# Gives the image a CPython of the wanted minor version as /opt/openpangu/python/bin/python3: the base's own where it
# has one, otherwise built from the source archive, whose sha256 is checked.
#
#   PYTHON_VERSION  3.9.10
#   PYTHON_URL      the source archive (.tar.xz or .tgz)
#   PYTHON_SHA256   of it
set -eu
minor=${PYTHON_VERSION%.*}
target=/opt/openpangu/python
mkdir -p "$target/bin"

for candidate in "python$minor" "/usr/local/python$minor"*/bin/"python$minor" python3; do
    found=$(command -v "$candidate" || true)
    if [ -n "$found" ] && [ "$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$minor" ]; then
        ln -s "$found" "$target/bin/python3"
        echo "python: the base's own, $("$found" -V), $found"
        exit
    fi
done

for tool in gcc make xz; do
    command -v $tool >/dev/null || {
        echo "python: this base has no Python $minor, and no $tool to build one with. Take another base with BASE=" >&2
        exit 1
    }
done
archive=/tmp/python-source
fetch='import sys, urllib.request as r; open(sys.argv[2], "wb").write(r.urlopen(sys.argv[1], timeout=120).read())'
if command -v curl >/dev/null; then
    curl --fail --silent --show-error --location --output $archive "$PYTHON_URL"
elif command -v python3 >/dev/null; then
    python3 -c "$fetch" "$PYTHON_URL" $archive
else
    wget -q -O $archive "$PYTHON_URL"
fi
echo "$PYTHON_SHA256  $archive" | sha256sum --check --status || {
    echo "python: $PYTHON_URL is not what PYTHON_SHA256 says" >&2
    exit 1
}
mkdir /tmp/python-build
tar --extract --file $archive --directory /tmp/python-build --strip-components 1
cd /tmp/python-build
./configure --quiet --prefix="$target" --without-ensurepip
make --silent -j"$(nproc)"
make --silent install
cd /
rm -rf /tmp/python-build $archive
missing=$("$target/bin/python3" -c '
for name in ("ssl", "zlib", "bz2", "lzma", "sqlite3", "ctypes", "hashlib"):
    try:
        __import__(name)
    except ImportError:
        print(name, end=" ")')
case "$missing" in *ssl* | *zlib* | *ctypes* | *hashlib*)
    echo "python: built without $missing: the base lacks their headers. Take another base with BASE=" >&2
    exit 1
    ;;
esac
echo "python: built $("$target/bin/python3" -V)${missing:+, without $missing}"
