#!/bin/sh
# Makes /opt/openpangu/venv from locks/ and this package's place in it, and, only to describe them, an environment of its
# own in sbom/. A build stage runs it; uv stays beside it.
#
#   install.sh TARGET           npu or cpu
#   TORCH                       cpu: the build from PyTorch's CPU index; pypi: PyPI's, which on x86-64 brings CUDA's libraries
#   PYPI_INDEX, TORCH_INDEX     addresses of the two indexes
#   /run/secrets/ca             certificates to trust beside the system's, if given
set -eu
ln -s /tree/opt/openpangu /opt/openpangu
venv=/opt/openpangu/venv
python=/opt/openpangu/python/bin/python3
"$python" -V || {
    echo "install: the compiled Python does not start here: take a BUILD_BASE that is no newer than the base" >&2
    exit 1
}
if [ -s /run/secrets/ca ]; then
    SSL_CERT_FILE=/run/secrets/ca
    export SSL_CERT_FILE
fi
export UV_NO_CACHE=1 UV_HTTP_TIMEOUT=300 UV_LINK_MODE=copy PYTHONDONTWRITEBYTECODE=1

"$python" fetch_uv.py "$PYPI_INDEX" locks/uv.txt .
install() { # <environment> <index> <lock>
    ./uv --no-config --no-python-downloads --quiet pip install --python "$1/bin/python" --no-deps --require-hashes \
        --only-binary :all: --default-index "$2" -r "locks/$3.txt"
}

"$python" -m venv --without-pip --prompt openpangu-sft $venv
index=$PYPI_INDEX
[ "$TORCH" = pypi ] || [ "$(uname -m)" != x86_64 ] || index=$TORCH_INDEX
install $venv "$index" "torch-$TORCH"
install $venv "$PYPI_INDEX" "image-$1"
"$python" -m venv --without-pip sbom
install sbom "$PYPI_INDEX" sbom

# What fits together, by metadata: torch_npu cannot be imported where there is no driver. It asks for PyTorch's CPU build by
# name, so PyPI's torch is the one exception.
# shellcheck disable=SC2016
known='^The package `torch-npu` requires `torch==2.1.0+cpu`'
if ! wrong=$(./uv --no-config pip check --python $venv/bin/python 2>&1); then
    complaints=$(printf '%s\n' "$wrong" | grep '^The package' || true)
    [ "$TORCH" != pypi ] || complaints=$(printf '%s\n' "$complaints" | grep -v "$known" || true)
    [ -z "$complaints" ] || {
        printf 'install: %s\n' "$complaints" >&2
        exit 1
    }
fi

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# accelerate, and so transformers, import torch_npu wherever it is installed; without a driver that fails, and with it
# stages that need no NPU. So it lies in a folder of its own, which is on the path where there are NPUs.
if [ "$1" = npu ]; then
    mkdir /opt/openpangu/torch_npu
    mv "$site"/torch_npu* /opt/openpangu/torch_npu/
    echo 'import os, sys; os.path.exists("/dev/davinci_manager") and sys.path.append("/opt/openpangu/torch_npu")' \
        >"$site/torch_npu.pth"
fi
# The package itself: its folder goes on the path as it is, so that patches and recipes are where it looks for them.
echo /opt/openpangu/app/src >"$site/openpangu_sft.pth"
cat >$venv/bin/openpangu-sft <<END
#!$venv/bin/python
from openpangu_sft.cli import main

main()
END
chmod 755 $venv/bin/openpangu-sft
