#!/bin/sh
# Compiles CPython for /opt/openpangu/python into a directory, with the libraries of its modules: a base has other versions
# (libssl.so.3 or libssl.so.1.1, libffi.so.7 or .8) or none. From the base it needs only the C library.
#
#   python_source.sh DIRECTORY
#   PYTHON_URL, PYTHON_SHA256   the source archive (.tar.xz or .tgz) and its sum
#   /run/secrets/ca             additional trusted certificates, if given
set -eu
prefix=/opt/openpangu/python
if [ -s /run/secrets/ca ]; then
    CURL_CA_BUNDLE=/run/secrets/ca
    export CURL_CA_BUNDLE
fi
curl --fail --silent --show-error --location --output /tmp/python-source "$PYTHON_URL"
echo "$PYTHON_SHA256  /tmp/python-source" | sha256sum --check --status || {
    echo "python: $PYTHON_URL does not match PYTHON_SHA256" >&2
    exit 1
}
mkdir /tmp/python
tar --extract --file /tmp/python-source --directory /tmp/python --strip-components 1
cd /tmp/python
# CPython embeds its build time, which the compiler takes from this variable.
SOURCE_DATE_EPOCH=0
export SOURCE_DATE_EPOCH
# No profile-guided optimisation: its builds are not reproducible.
./configure --quiet --prefix=$prefix --without-ensurepip --enable-loadable-sqlite-extensions LDFLAGS="-Wl,-rpath,$prefix/lib"
make --silent -j"$(nproc)"
make --silent install DESTDIR=/tmp/installed
mv "/tmp/installed$prefix" /tmp/python-installed
rm -rf /tmp/python-installed/lib/python*/test /tmp/python-installed/lib/python*/config-*/*.a /tmp/python-installed/lib/*.a
mkdir -p "$1"
mv /tmp/python-installed/* "$1/"
ldd "$1"/lib/python*/lib-dynload/*.so | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | sort -u |
    grep -Ev '/(libc|libm|libdl|libpthread|librt|libutil)\.so\.' | while read -r library; do
    cp -L "$library" "$1/lib/"
    # for the SBOM, if BUILD_BASE is Debian or Ubuntu: name and version
    package=$(dpkg-query --search "*/${library##*/}" 2>/dev/null | sed -n '1s/:.*//p')
    [ -z "$package" ] || printf '%s %s\n' "$package" "$(dpkg-query --show "$package" | sed 's/.*\t//;1q')"
done | sort -u >"$1/lib/libraries.txt"
missing=$("$1/bin/python3" -c '
for name in ("ssl", "zlib", "bz2", "lzma", "sqlite3", "ctypes", "hashlib"):
    try:
        __import__(name)
    except ImportError:
        print(name, end=" ")')
[ -z "$missing" ] || {
    echo "python: compiled without ${missing}-> use a BUILD_BASE that has their headers" >&2
    exit 1
}
echo "python: compiled $("$1/bin/python3" -V)"
