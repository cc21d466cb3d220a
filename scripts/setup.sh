#!/usr/bin/env bash
# Makes or updates the Python environment from locks/; returns at once when nothing has changed.
#
#   VENV        the environment's directory, seen from the repository's root (.venv)
#   PYTHON      the CPython 3.9, 3.10 or 3.11 to use (the first one on PATH that fits)
#   PYPI_INDEX  the package index, or a mirror of it (https://pypi.org/simple)
#
# pip and uv both take proxies from HTTPS_PROXY and a company's certificates from SSL_CERT_FILE.
# Their configuration files are left out: what is installed is what locks/ says, on every machine.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
unset PYTHONHOME PYTHONPATH # CANN's set_env.sh sets the second; neither belongs in this environment

VENV=${VENV:-.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
PYTHON=${PYTHON:-}
PYPI_INDEX=${PYPI_INDEX:-https://pypi.org/simple}
# Marks the directory as ours. Filled last of all: an empty one tells of a run that was cut short.
stamp=$VENV/.openpangu-sft-setup

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    printf 'openpangu-sft: %s\n' "$*" >&2
    exit 1
}

# An interpreter is asked, never judged by its name: pyenv's shims may be there and not start.
version_of() {
    "$1" -S -c 'import sys
print(("" if sys.implementation.name == "cpython" else sys.implementation.name + " ") + sys.version.split()[0])' 2>/dev/null
}

# Two lines: what the environment was made of, and what was installed into it.
stamp_for() { # <the interpreter's version>
    { echo "$1 $VENV" && cat scripts/setup.sh locks/uv.txt; } | sha256sum
    cat pyproject.toml locks/portable.txt | sha256sum
}

# Sets version; true when the environment's interpreter starts and is the wanted one.
venv_starts() {
    version=$(version_of "$VENV/bin/python") && { [[ -z $PYTHON ]] || [[ $(version_of "$PYTHON") == "$version" ]]; }
}
ready() { [[ -s $stamp ]] && venv_starts && [[ $(<"$stamp") == "$(stamp_for "$version")" ]]; }

# Sets python and version.
find_python() {
    local names=(python3 python3.11 python3.10 python3.9) name found=()
    [[ -z $PYTHON ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        while IFS= read -r python; do
            version=$(version_of "$python") || version='does not start'
            if [[ $version =~ ^3\.(9|10|11)\. ]]; then
                "$python" -c 'import ensurepip, venv' 2>/dev/null ||
                    die "$python ($version) cannot make environments -> install the package python3-venv (or python${version%.*}-venv)"
                return
            fi
            found+=("$python ($version)")
        done < <(type -aP -- "$name")
    done
    local list
    printf -v list '%s, ' "${found[@]:-nothing}"
    die "CPython 3.9, 3.10 or 3.11 is needed; found for ${names[*]}: ${list%, } -> install python3 and python3-venv (Debian 12 has 3.11), or name one with PYTHON=/path/to/python3.11"
}

make_venv() {
    find_python
    [[ -e $stamp || -z $(ls -A -- "$VENV" 2>/dev/null) ]] ||
        die "$VENV was not made by this script and is left as it is -> remove it, or name another directory with VENV="
    say "making $VENV with Python $version; the first time about 2.8 GB come down on x86-64 (torch brings CUDA's libraries), 0.2 GB on aarch64"
    mkdir -p -- "$VENV"
    : >"$stamp"
    find "$VENV/" -mindepth 1 -maxdepth 1 ! -name "${stamp##*/}" -exec rm -rf -- {} +
    "$python" -m venv --prompt openpangu-sft "$VENV" || die "could not make $VENV (see above)"

    local cert=${PIP_CERT:-${SSL_CERT_FILE:-}} host=${PYPI_INDEX#*://} options=()
    [[ -z $cert ]] || options+=(--cert "$cert")
    host=${host##*@} host=${host%%/*}
    [[ $PYPI_INDEX != http://* ]] || options+=(--trusted-host "$host") # the hashes are what is trusted
    "$VENV/bin/python" -m pip --isolated --disable-pip-version-check --quiet install --no-deps --require-hashes \
        --only-binary :all: --index-url "$PYPI_INDEX" "${options[@]}" -r locks/uv.txt || no_download locks/uv.txt
}

no_download() {
    local index=$PYPI_INDEX
    [[ $index != *@* ]] || index=${index%%://*}://${index##*@} # without a password
    die "could not install $1 from $index (see above) -> is the network there? A mirror: PYPI_INDEX=https://…; a proxy: HTTPS_PROXY. Then run it again: what came down is kept"
}

if ready; then exit; fi

mkdir -p -- "$(dirname -- "$VENV")"
exec 9>"$VENV.lock" # beside the environment, as that may be removed; whatever this run started holds it too
flock --nonblock 9 || { say "waiting for another setup of $VENV" && flock 9; }
if ready; then exit; fi # the other one did it

# Only a finished environment is updated. One that was cut short may have packages that look installed and
# lack files, so it is made anew: what came down before is in uv's cache.
if venv_starts && [[ -s $stamp && $(head -n 1 "$stamp") == "$(stamp_for "$version" | head -n 1)" ]]; then
    say "updating $VENV"
    : >"$stamp"
else
    make_venv
fi
wanted=$(stamp_for "$version") # of the files as they are now, should they change meanwhile

uv=("$VENV/bin/uv" --no-config --no-python-downloads)
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-120}
# Where files cannot be linked from uv's cache they are copied, without a warning.
cache=$("${uv[@]}" cache dir)
mkdir -p -- "$cache" 2>/dev/null || true
[[ $(stat -c %d -- "$cache" 2>/dev/null) == $(stat -c %d -- "$VENV") ]] || export UV_LINK_MODE=${UV_LINK_MODE:-copy}

# uv keeps itself and pip: it does not remove what `python -m venv` and installers bring.
"${uv[@]}" pip sync --python "$VENV/bin/python" --require-hashes --only-binary :all: --compile-bytecode \
    --default-index "$PYPI_INDEX" locks/portable.txt || no_download locks/portable.txt
# With the environment's own setuptools, so that no build backend without a hash is fetched.
"${uv[@]}" pip install --python "$VENV/bin/python" --quiet --offline --no-deps --no-build-isolation -e . ||
    die "could not install openpangu-sft itself (see above)"

printf '%s\n' "$wanted" >"$stamp"
