#!/bin/sh
# Compiles Megatron-LM's datasets helper for the image's Python, next to its source in mindspeed-llm.
#
#   helpers.sh SOURCES ROOT   the folder of `make sources`; the root of the stage that has /opt/openpangu/venv
set -eu
folder=$1/mindspeed-llm/megatron/core/datasets
chroot "$2" /opt/openpangu/venv/bin/python -c '
import pybind11, sysconfig
print(sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_path("include"), pybind11.get_include())' >/tmp/python
read -r suffix headers pybind11 </tmp/python
# The headers are in the base, come with a compiled Python, or are here, of the same minor version.
found=
for directory in "$2$headers" "$2/tree$headers" "/usr/include/${headers##*/}"; do
    [ ! -f "$directory/Python.h" ] || found=${found:-$directory}
done
[ -n "$found" ] || {
    echo "helpers: neither the base nor BUILD_BASE has the headers of ${headers##*/} -> use another BUILD_BASE" >&2
    exit 1
}
g++ -O3 -Wall -shared -std=c++11 -fPIC -I"$found" -I"$2/tree$pybind11" "$folder/helpers.cpp" -o "$folder/helpers$suffix"
echo "helpers: compiled helpers$suffix with $found"
