#!/bin/sh
# Writes versions.json, sbom.json and provenance.json, which describe the image.
#
#   sbom.sh TARGET COMMIT BASE DIRECTORY
set -eu
PYTHONPATH=/opt/openpangu/torch_npu
export PYTHONPATH
sbom/bin/cyclonedx-py environment --short-PURLs --output-reproducible --spec-version 1.5 --output-file packages.json \
    /opt/openpangu/venv/bin/python
/opt/openpangu/venv/bin/python describe.py "$@"
sbom/bin/python -c '
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
wrong = JsonStrictValidator(SchemaVersion.V1_5).validate_str(open(sys.argv[1], encoding="utf-8").read())
sys.exit(f"sbom: {wrong}" if wrong else 0)' "$4/sbom.json"
