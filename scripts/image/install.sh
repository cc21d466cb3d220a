#!/bin/sh
# Makes /opt/openpangu/venv from locks/ and installs this package into it; a build stage of its own runs it.
#
#   TARGET      npu or cpu
#   TORCH       cpu: the build from PyTorch's CPU index; pypi: PyPI's, which on x86-64 brings CUDA's libraries
#   PYPI_INDEX, TORCH_INDEX   addresses of the two indexes
#   /run/secrets/ca           certificates to trust beside the system's, if given
set -eu
venv=/opt/openpangu/venv
python=/opt/openpangu/python/bin/python3
if [ -s /run/secrets/ca ]; then
    SSL_CERT_FILE=/run/secrets/ca
    export SSL_CERT_FILE
fi
export UV_NO_CACHE=1 UV_HTTP_TIMEOUT=300 UV_LINK_MODE=copy PYTHONDONTWRITEBYTECODE=1

"$python" scripts/image/fetch_uv.py "$PYPI_INDEX" locks/uv.txt /tmp
uv() { /tmp/uv --no-config --no-python-downloads --quiet "$@"; }

"$python" -m venv --without-pip --prompt openpangu-sft $venv
index=$PYPI_INDEX
[ "$TORCH" = pypi ] || [ "$(uname -m)" != x86_64 ] || index=$TORCH_INDEX
uv pip install --python $venv/bin/python --no-deps --require-hashes --only-binary :all: \
    --default-index "$index" -r "locks/torch-$TORCH.txt"
uv pip install --python $venv/bin/python --no-deps --require-hashes --only-binary :all: \
    --default-index "$PYPI_INDEX" -r "locks/image-$TARGET.txt"

# The package itself: its folder goes on the path as it is, so that patches and recipes are where it looks for them.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo /opt/openpangu/app/src >"$site/openpangu_sft.pth"
cat >$venv/bin/openpangu-sft <<EOF
#!$venv/bin/python
from openpangu_sft.cli import main

main()
EOF
chmod 755 $venv/bin/openpangu-sft
rm -f /tmp/uv
