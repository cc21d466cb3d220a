# shellcheck shell=bash disable=SC2034,SC2154
# Devices and files of this host that a container needs for its NPUs. Sourced; sets the arrays npu_devices and npu_mounts
# (host path:container path) or, with Ascend Docker Runtime, npu_visible instead.
#
#   NPUS        numbers of the NPUs: 0,1,2,3 (all)
#   HOST_ROOT   root of this host's files (/); for tests
#
# The lists follow the CANN images' documentation (device nodes, DCMI library, npu-smi, driver) and public guides for several
# machines (addresses of the NPUs' network, and its test tool).

npu_devices=() npu_mounts=() npu_visible=
host_root=${HOST_ROOT:-}

has_npus() { [[ -e $host_root/dev/davinci_manager ]]; }

find_npus() {
    local device path numbers=() wanted number
    for device in "$host_root"/dev/davinci[0-9]*; do
        [[ ! -e $device ]] || numbers+=("${device##*davinci}")
    done
    ((${#numbers[@]})) || die "this host has $host_root/dev/davinci_manager, but no NPU ($host_root/dev/davinci0 and so on) -> does npu-smi info show one?"
    mapfile -t numbers < <(printf '%s\n' "${numbers[@]}" | sort -n)
    wanted=("${numbers[@]}")
    if [[ -n ${NPUS:-} ]]; then
        [[ $NPUS =~ ^[0-9]+(,[0-9]+)*$ ]] || die "NPUS=$NPUS is not a list of numbers -> write NPUS=0,1,2,3"
        IFS=, read -ra wanted <<<"$NPUS"
        for number in "${wanted[@]}"; do
            [[ -e $host_root/dev/davinci$number ]] || die "NPUS=$NPUS: this host has no NPU $number -> it has ${numbers[*]}"
        done
    fi
    if "$docker" info --format '{{json .Runtimes}}' 2>/dev/null | grep -q '"ascend"'; then
        npu_visible=$(IFS=, && echo "${wanted[*]}")
        return
    fi
    for path in davinci_manager devmm_svm hisi_hdc "${wanted[@]/#/davinci}"; do
        npu_devices+=("$host_root/dev/$path:/dev/$path")
    done
    for path in /usr/local/dcmi /usr/local/bin/npu-smi /usr/local/sbin/npu-smi /usr/local/Ascend/driver/lib64 \
        /usr/local/Ascend/driver/version.info /etc/ascend_install.info \
        /usr/local/Ascend/driver/tools/hccn_tool /etc/hccn.conf; do
        [[ ! -e $host_root$path ]] || npu_mounts+=("$host_root$path:$path")
    done
}
