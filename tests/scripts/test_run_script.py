"""scripts/run.sh and scripts/compose.sh: where a stage runs, and what its container sees of the host."""

from __future__ import annotations

import os

import pytest

from docker_host import CPU, NPU, Host, host
from parameter_ids import named_by

__all__ = ["host"]


def test_runs_in_the_image_with_this_directory_as_the_caller(host: Host) -> None:
    done = host.run("sft", "--recipe", "recipes/x.yaml", IMAGES=CPU)
    assert (done.returncode, done.stderr) == (0, f"in {CPU}\n")
    assert host.called_with()[-5:] == [CPU, "openpangu-sft", "sft", "--recipe", "recipes/x.yaml"]
    assert host.given("--workdir") == [str(host.folder)]
    assert host.mounts() == [(str(host.folder), str(host.folder))]
    assert {f"HOST_UID={os.getuid()}", f"HOST_GID={os.getgid()}"} <= set(host.given("--env"))
    assert f"OPENPANGU_SFT_IMAGE={CPU} sha256:abc" in host.given("--env")
    assert {"--rm", "--init"} <= set(host.called_with())
    assert not {"--privileged", "--tty", "--device"} & set(host.called_with())


def test_exit_code_is_the_containers(host: Host) -> None:
    assert host.run("sft", IMAGES=CPU, FAKE_EXIT="3").returncode == 3


@pytest.mark.parametrize(
    ("npus", "images", "given", "used"),
    [
        (0, f"{CPU} {NPU}", {}, CPU),
        (0, NPU, {}, NPU),
        (2, f"{CPU} {NPU}", {}, NPU),
        (2, CPU, {}, CPU),
        (2, f"{CPU} {NPU}", {"TARGET": "cpu"}, CPU),
        (0, f"{CPU} {NPU}", {"TARGET": "npu"}, NPU),
    ],
)
def test_image(host: Host, npus: int, images: str, given: dict[str, str], used: str) -> None:
    if npus:
        host.add_npus(npus)
    assert host.run("sft", IMAGES=images, **given).stderr == f"in {used}\n"


def installed(host: Host, line: str) -> None:
    """Puts a program that runs this line in the place of the command."""
    setup = host.folder / "scripts/setup.sh"
    setup.write_text("#!/bin/sh\nmkdir -p .venv/bin\n")
    program = host.folder / ".venv/bin/openpangu-sft"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{line}\n")
    for file in (setup, program):
        file.chmod(0o755)


def test_this_machine_where_no_engine_or_no_image_is(host: Host) -> None:
    installed(host, 'echo "here: $*"')
    for environment in ({"NO_ENGINE": "1", "IMAGES": CPU}, {"IMAGES": "other:1"}, {"IMAGES": CPU, "RUNTIME": "host"}):
        done = host.run("merge", "--help", **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "here: merge --help\n", "")


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"HOSTTYPE": "x86_64"}, ""),
        ({"HOSTTYPE": "aarch64"}, "1"),
        ({"HOSTTYPE": "aarch64", "OPENBLAS_NUM_THREADS": "4"}, "4"),
    ],
)
def test_openblas_has_one_thread_on_aarch64(host: Host, environment: dict[str, str], threads: str) -> None:
    installed(host, 'echo "$OPENBLAS_NUM_THREADS"')
    assert host.run("sft", RUNTIME="host", **{"OPENBLAS_NUM_THREADS": "", **environment}).stdout == f"{threads}\n"


@pytest.mark.parametrize(
    ("environment", "message"),
    named_by(
        0,
        ({"RUNTIME": "dokcer"}, "RUNTIME=dokcer is neither docker nor host"),
        (
            {"RUNTIME": "docker"},
            f"there is no image {CPU} -> run make image TARGET=cpu, or make load in an offline bundle",
        ),
        ({"RUNTIME": "docker", "NO_ENGINE": "1"}, "no Docker engine answers"),
        ({"RUNTIME": "docker", "TARGET": "gpu"}, "TARGET=gpu is neither npu nor cpu"),
        ({"RUNTIME": "host"}, "this folder is an offline bundle and has no code -> use RUNTIME=docker"),
        ({"IMAGES": CPU, "CACHE": "/no/such"}, "CACHE=/no/such does not exist -> create it"),
    ),
)
def test_refusals(host: Host, environment: dict[str, str], message: str) -> None:
    done = host.run("sft", **environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"openpangu-sft: {message}")
    assert not host.calls.exists()


def test_only_options_several_machines_and_trackers_are_passed_on(host: Host) -> None:
    environment = {
        "OPENPANGU_PROMPT": 'it\'s "50%": $HOME\n',
        "MASTER_ADDR": "10.0.0.1",
        "NODE_RANK": "1",
        "HCCL_CONNECT_TIMEOUT": "1200",
        "HCCL_IF_IP": "10.0.0.2",
        "SWANLAB_API_KEY": "x",
        "WANDB_MODE": "offline",
    }
    others = {
        "OPENPANGU_SFT_IMAGE": "x",
        "OPENPANGU_TOKEN": "x",
        "OPENPANGU_HOME": "/opt",
        "ASCEND_HOME_PATH": "/host/only",
        "PYTHONPATH": "/host/only",
        "SECRET": "x",
    }
    host.run("sft", IMAGES=CPU, MAKE_OPTIONS="PROMPT", **environment, **others)
    names = {value.split("=")[0] for value in host.given("--env")}
    assert names - {"TERM", "OMP_NUM_THREADS"} == {"HOST_UID", "HOST_GID", "OPENPANGU_SFT_IMAGE", *environment}


DRIVER = ["usr/local/dcmi/x", "usr/local/sbin/npu-smi", "usr/local/Ascend/driver/lib64/x"]
DRIVER += ["usr/local/Ascend/driver/version.info", "etc/ascend_install.info"]
DRIVER += ["usr/local/Ascend/driver/tools/hccn_tool", "etc/hccn.conf"]


@pytest.mark.parametrize(("npus", "numbers"), [("", range(12)), ("0,11", [0, 11]), ("3", [3])])
def test_npus(host: Host, npus: str, numbers: list[int]) -> None:
    host.add_npus(12)
    host.add(*DRIVER)
    assert host.run("sft", IMAGES=NPU, NPUS=npus).returncode == 0
    names = ["davinci_manager", "devmm_svm", "hisi_hdc", *(f"davinci{number}" for number in numbers)]
    assert host.given("--device") == [f"{host.root}/dev/{name}:/dev/{name}" for name in names]
    mounted = ["/usr/local/dcmi", "/usr/local/sbin/npu-smi", "/usr/local/Ascend/driver/lib64"]
    mounted += ["/usr/local/Ascend/driver/version.info", "/etc/ascend_install.info"]
    mounted += ["/usr/local/Ascend/driver/tools/hccn_tool", "/etc/hccn.conf"]
    assert host.given("--volume") == [f"{host.root}{path}:{path}:ro" for path in mounted]


def test_npus_by_ascend_docker_runtime(host: Host) -> None:
    host.add_npus(4)
    runtimes = '{"ascend":{"path":"/usr/local/Ascend/Ascend-Docker-Runtime/ascend-docker-runtime"},"runc":{}}'
    assert host.run("sft", IMAGES=NPU, NPUS="2,3", RUNTIMES=runtimes).returncode == 0
    assert host.given("--device") == []
    assert host.given("--runtime") == ["ascend"]
    assert "ASCEND_VISIBLE_DEVICES=2,3" in host.given("--env")


@pytest.mark.parametrize(
    ("npus", "message"),
    [
        ("0,4", "NPUS=0,4: this host has no NPU 4 -> it has 0 1 2 3"),
        ("0-3", "NPUS=0-3 is not a list of numbers -> write NPUS=0,1,2,3"),
        ("0, 1", "NPUS=0, 1 is not a list of numbers -> write NPUS=0,1,2,3"),
    ],
)
def test_npus_that_are_not_there(host: Host, npus: str, message: str) -> None:
    host.add_npus(4)
    done = host.run("sft", IMAGES=NPU, NPUS=npus)
    assert (done.returncode, done.stderr) == (1, f"openpangu-sft: {message}\n")


def test_more_options_for_docker(host: Host) -> None:
    host.run("sft", IMAGES=CPU, DOCKER_FLAGS="-v /models:/models:ro --memory 8g")
    call = host.called_with()
    assert call[call.index("-v") :][:4] == ["-v", "/models:/models:ro", "--memory", "8g"]


def test_compose_override_is_this_hosts(host: Host) -> None:
    host.add_npus(2)
    host.add(*DRIVER)
    assert host.script("compose.sh", NPUS="1").returncode == 0
    override = (host.folder / "docker-compose.override.yml").read_text()
    assert f'- "{host.root}/dev/davinci1:/dev/davinci1"' in override
    assert "davinci0" not in override
    assert host.script("compose.sh").returncode == 0  # ours is replaced
    assert "davinci0" in (host.folder / "docker-compose.override.yml").read_text()


def test_compose_override_of_somebody_else_is_kept(host: Host) -> None:
    host.add_npus(2)
    theirs = host.folder / "docker-compose.override.yml"
    theirs.write_text("services: {}\n")
    done = host.script("compose.sh")
    assert done.returncode == 1
    assert "was not written by this script and is left as it is" in done.stderr
    assert theirs.read_text() == "services: {}\n"


def test_compose_without_npus(host: Host) -> None:
    done = host.script("compose.sh")
    assert done.returncode == 1
    assert "this host has no NPU" in done.stderr
    assert not (host.folder / "docker-compose.override.yml").exists()
