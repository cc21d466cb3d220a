#!/bin/sh
# Builds /opt/openpangu/venv from locks/ with an entry for this package, and an environment in sbom/ for the tools that write
# the SBOM. Runs in a build stage; downloads are kept in /root/.cache, a cache mount.
#
#   install.sh TARGET           npu or cpu
#   TORCH                       cpu: the build from PyTorch's CPU index; pypi: PyPI's, which on x86-64 includes CUDA libraries
#   PYPI_INDEX, TORCH_INDEX     URLs of the two indexes
#   /run/secrets/ca             additional trusted certificates, if given
set -eu
ln -s /tree/opt/openpangu /opt/openpangu
venv=/opt/openpangu/venv
python=/opt/openpangu/python/bin/python3
"$python" -c 'import bz2, ctypes, hashlib, lzma, sqlite3, ssl, zlib' || {
    echo "install: the compiled Python does not run in this base -> use a BUILD_BASE whose C library is not newer than the base's" >&2
    exit 1
}
target=$1
if [ -s /run/secrets/ca ]; then
    SSL_CERT_FILE=/run/secrets/ca
    export SSL_CERT_FILE
fi
export UV_HTTP_TIMEOUT=300 UV_LINK_MODE=copy PYTHONDONTWRITEBYTECODE=1

# uv is installed with Python's own pip, as in scripts/setup.sh.
"$python" -m venv uv
set --
[ -z "${SSL_CERT_FILE:-}" ] || set -- --cert "$SSL_CERT_FILE"
case $PYPI_INDEX in
http://*)
    host=${PYPI_INDEX#http://}
    host=${host##*@}
    set -- "$@" --trusted-host "${host%%/*}" # safe: packages are pinned by hash
    ;;
esac
uv/bin/python -m pip --isolated --disable-pip-version-check --quiet install --no-deps --require-hashes \
    --only-binary :all: --index-url "$PYPI_INDEX" "$@" -r locks/uv.txt
uv() { uv/bin/uv --no-config --no-python-downloads --quiet "$@"; }
install() { # <environment> <index> <lock>
    uv pip install --python "$1/bin/python" --no-deps --require-hashes --only-binary :all: --default-index "$2" \
        -r "locks/$3.txt"
}

"$python" -m venv --without-pip --prompt openpangu-sft $venv
index=$PYPI_INDEX
[ "$TORCH" = pypi ] || [ "$(uname -m)" != x86_64 ] || index=$TORCH_INDEX
install $venv "$index" "torch-$TORCH"
install $venv "$PYPI_INDEX" "image-$target"
"$python" -m venv --without-pip sbom
install sbom "$PYPI_INDEX" sbom

# Checks compatibility by metadata, because torch_npu cannot be imported without a driver. It requires PyTorch's CPU build by
# name, so PyPI's torch is an exception; as is what lm-eval imports for some tasks only and has no wheels.
uv/bin/uv --no-config pip check --python $venv/bin/python 2>&1 | while read -r line; do
    # shellcheck disable=SC2016
    case $TORCH:$line in
    pypi:'The package `torch-npu` requires `torch==2.1.0+cpu`'*) ;;
    *'`lm-eval` requires `rouge-score'* | *'`lm-eval` requires `sqlitedict'* | *'`lm-eval` requires `word2number'*) ;;
    *:'The package '*)
        echo "install: $line" >&2
        exit 1
        ;;
    esac
done

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# accelerate, and so transformers, import torch_npu wherever it is installed, which fails without a driver even in stages that
# need no NPU. So it has a separate folder, which is on the path only on a host with NPUs.
if [ "$target" = npu ]; then
    mkdir /opt/openpangu/torch_npu
    mv "$site"/torch_npu* /opt/openpangu/torch_npu/
    echo 'import os, sys; os.path.exists("/dev/davinci_manager") and sys.path.append("/opt/openpangu/torch_npu")' \
        >"$site/torch_npu.pth"
fi
# The package itself is on the path in place, so that it finds its patches and recipes.
echo /opt/openpangu/app/src >"$site/openpangu_sft.pth"
cat >$venv/bin/openpangu-sft <<END
#!$venv/bin/python
from openpangu_sft.__main__ import main

main()
END
chmod 755 $venv/bin/openpangu-sft
