#!/usr/bin/env bash
# Creates or updates the Python environment from locks/; returns at once if nothing has changed.
#
#   VENV        directory of the environment, relative to the repository's root (.venv)
#   PYTHON      CPython 3.9, 3.10 or 3.11 to use (the first suitable one on PATH)
#   PYPI_INDEX  package index or a mirror of it (https://pypi.org/simple)
#
# pip and uv take proxies from HTTPS_PROXY and certificates from SSL_CERT_FILE. Their configuration files are ignored, so
# that locks/ alone determines what is installed.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
unset PYTHONHOME PYTHONPATH # CANN's set_env.sh sets the second; neither belongs in this environment

VENV=${VENV:-.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
PYTHON=${PYTHON:-}
PYPI_INDEX=${PYPI_INDEX:-https://pypi.org/simple}
# Marks the directory as ours. Written last: an empty one means that a run was interrupted.
stamp=$VENV/.openpangu-sft-setup

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    printf 'openpangu-sft: %s\n' "$*" >&2
    exit 1
}

# Asks the interpreter, as pyenv's shims may exist and not start.
version_of() {
    "$1" -S -c 'import sys
print(("" if sys.implementation.name == "cpython" else sys.implementation.name + " ") + sys.version.split()[0])' 2>/dev/null
}

# Two lines: what the environment was created from, and what was installed into it.
stamp_for() { # <the interpreter's version>
    { echo "$1 $VENV" && cat scripts/setup.sh locks/uv.txt; } | sha256sum
    cat pyproject.toml locks/portable.txt | sha256sum
}

# Sets version; true if the environment's interpreter starts and is the requested one.
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
        die "$VENV was not made by this script and is left as it is -> remove it, or choose another directory with VENV="
    [[ ! -L $VENV ]] || # what it points to may be used by another checkout
        die "$VENV is a symbolic link and its target is left as it is -> remove the link, or set VENV= to the target"
    say "making $VENV with Python $version; the first time downloads 2.8 GB on x86-64 (torch with CUDA libraries), 0.2 GB on aarch64"
    mkdir -p -- "$VENV"
    : >"$stamp"
    find "$VENV/" -mindepth 1 -maxdepth 1 ! -name "${stamp##*/}" -exec rm -rf -- {} +
    "$python" -m venv --prompt openpangu-sft "$VENV" || die "could not make $VENV (see above)"

    local cert=${PIP_CERT:-${SSL_CERT_FILE:-}} host=${PYPI_INDEX#*://} options=()
    [[ -z $cert ]] || options+=(--cert "$cert")
    host=${host##*@} host=${host%%/*}
    [[ $PYPI_INDEX != http://* ]] || options+=(--trusted-host "$host") # hashes protect the content
    "$VENV/bin/python" -m pip --isolated --disable-pip-version-check --quiet install --no-deps --require-hashes \
        --only-binary :all: --index-url "$PYPI_INDEX" "${options[@]}" -r locks/uv.txt || no_download locks/uv.txt
}

no_download() {
    local index=$PYPI_INDEX
    [[ $index != *@* ]] || index=${index%%://*}://${index##*@} # without a password
    die "could not install $1 from $index (see above) -> check the network, or set a mirror (PYPI_INDEX=https://…) or a proxy (HTTPS_PROXY), and run it again: downloads are kept"
}

# Of uv's output: warnings, errors and large downloads, and one line for all packages.
summarize() {
    local line installed=0 removed=0
    while IFS= read -r line; do
        case $line in
        ' + '* | ' ~ '*) installed=$((installed + 1)) ;;
        ' - openpangu-sft'*) ;; # reinstalled below
        ' - '*) removed=$((removed + 1)) ;;
        Resolved* | Prepared* | Installed* | Uninstalled* | Audited* | Bytecode*) ;;
        *) printf '%s\n' "$line" >&2 ;;
        esac
    done
    say "packages: $installed installed, $removed removed"
}

if ready; then exit; fi

mkdir -p -- "$(dirname -- "$VENV")"
exec 9>"$VENV.lock" # beside the environment, which may be removed; child processes hold it too
flock --nonblock 9 || { say "waiting for another setup of $VENV" && flock 9; }
if ready; then exit; fi # by the other setup

# Only a finished environment is updated. After an interruption, packages may look installed and lack files, so the
# environment is created again; uv's cache keeps the downloads.
if venv_starts && [[ -s $stamp && $(head -n 1 "$stamp") == "$(stamp_for "$version" | head -n 1)" ]]; then
    say "updating $VENV"
    : >"$stamp"
else
    make_venv
fi
wanted=$(stamp_for "$version") # before the files can change

uv=("$VENV/bin/uv" --no-config --no-python-downloads)
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-120}
# Files that cannot be linked from uv's cache are copied, without a warning.
cache=$("${uv[@]}" cache dir)
mkdir -p -- "$cache" 2>/dev/null || true
[[ $(stat -c %d -- "$cache" 2>/dev/null) == $(stat -c %d -- "$VENV") ]] || export UV_LINK_MODE=${UV_LINK_MODE:-copy}

# Keeps uv and pip themselves: sync does not remove what `python -m venv` and installers bring.
"${uv[@]}" pip sync --python "$VENV/bin/python" --require-hashes --only-binary :all: --compile-bytecode \
    --default-index "$PYPI_INDEX" locks/portable.txt 2>&1 | summarize || no_download locks/portable.txt
# With the environment's own setuptools: a build backend would be downloaded without a hash.
"${uv[@]}" pip install --python "$VENV/bin/python" --quiet --offline --no-deps --no-build-isolation -e . ||
    die "could not install openpangu-sft itself (see above)"

printf '%s\n' "$wanted" >"$stamp"
