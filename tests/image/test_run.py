"""Stages in the image: run as the caller, with exit codes and signals passed through."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from image.engine import CPU, NPU, Engine

TRAINING = ["openpangu-sft", "sft", "--recipe=recipes/demo.yaml", "--set=paths.cache=/cache/demo"]
TRAINING.append("--set=train.lr_warmup_iterations=1")


@pytest.fixture(scope="module")
def data(engine: Engine, cpu_image: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the demo, for other tests to copy."""
    cache = tmp_path_factory.mktemp("data")
    command = ["openpangu-sft", "demo", "--set", "train.iterations=2", "--set", "train.lr_warmup_iterations=1"]
    place = ["--volume", f"{cache}:/cache", "--workdir", "/cache"]
    subprocess.run([engine.client, "run", "--rm", *place, CPU, *command], capture_output=True)
    assert (cache / ".cache/demo/ckpts/pangu_model_mcore").is_dir()
    shutil.rmtree(cache / ".cache/demo/sft_outputs")
    return cache / ".cache/demo"


def test_the_demo_runs_as_an_ordinary_user_who_owns_its_files(
    cpu_image: SimpleNamespace, user: SimpleNamespace
) -> None:
    done = user.run("make", "demo", "SET=paths.cache=/cache/demo")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.startswith(f"in {CPU}\n")
    assert "answered: 云雾茶社每天早上九点开门，晚上九点半打烊。" in done.stderr
    assert (user.cache / "demo/sft_outputs/loss.png").read_bytes().startswith(b"\x89PNG")
    made = list((user.cache / "demo").rglob("*"))
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(user.uid, user.gid)}
    assert (user.cache / "demo/sft_outputs/report.html").stat().st_uid == user.uid
    start = json.loads((user.cache / "demo/sft_outputs/starts.jsonl").read_text().splitlines()[0])
    assert re.fullmatch(rf"{CPU} sha256:[0-9a-f]{{64}}", start["image"])
    # a later stage, which writes its page into the clone
    done = user.run("make", "preview", "RECIPE=recipes/demo.yaml", "SET=paths.cache=/cache/demo", "HTML=page.html")
    assert done.returncode == 0, done.stderr
    assert (user.clone / "page.html").stat().st_uid == user.uid


def test_doctor_and_plan_in_the_image(cpu_image: SimpleNamespace, user: SimpleNamespace) -> None:
    done = user.run("make", "doctor", "RECIPE=recipes/demo.yaml", "SET=paths.cache=/cache/demo", "JSON=1")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert found["where"]["where"].startswith(f"in the image {CPU}")
    states = {entry["check"]: entry["state"] for entry in found["checks"]}
    assert (states["packages"], states["tensors"], states["NPUs"]) == ("ok", "ok", "skipped")
    done = user.run("make", "plan", "JSON=1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == 1_155_912_192


def copied(data: Path, user: SimpleNamespace) -> None:
    shutil.copytree(data, user.cache / "demo")
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", f"{user.uid}:{user.gid}", str(user.cache / "demo")], check=True)


def begun(user: SimpleNamespace, **streams: Any) -> subprocess.Popen[str]:
    """A long training in a container that has logged its first iterations."""
    training: subprocess.Popen[str] = user.popen("scripts/run.sh", *TRAINING, "--set=train.iterations=9999", **streams)
    metrics = user.cache / "demo/sft_outputs/metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and len(metrics.read_text().splitlines()) > 2:
            return training
        assert training.poll() is None, "training ended"
        time.sleep(0.2)
    training.kill()
    raise AssertionError("training did not begin")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_with_a_checkpoint(
    engine: Engine, data: Path, user: SimpleNamespace, number: signal.Signals
) -> None:
    copied(data, user)
    training = begun(user, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    training.send_signal(number)
    _, said = training.communicate(timeout=120)
    assert training.returncode == 128 + number
    assert f"stopped by {number.name}" in said
    assert engine("ps", "--quiet", "--filter", f"ancestor={CPU}") == ""
    saved = int((user.cache / "demo/sft_outputs/latest_checkpointed_iteration.txt").read_text())
    done = user.run("scripts/run.sh", *TRAINING, f"--set=train.iterations={saved + 1}")
    assert done.returncode == 0, done.stderr
    rows = (user.cache / "demo/sft_outputs/metrics.jsonl").read_text().splitlines()
    assert len(rows) == saved + 1  # resumed, not restarted


def test_ctrl_c_on_a_terminal(engine: Engine, data: Path, user: SimpleNamespace) -> None:
    copied(data, user)
    ours, theirs = pty.openpty()
    screen: list[bytes] = []

    def read() -> None:
        try:
            while block := os.read(ours, 4096):
                screen.append(block)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    training = begun(user, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.write(ours, b"\x03")
    assert training.wait(120) == 130
    reader.join(10)
    os.close(ours)
    assert "stopped by SIGINT" in b"".join(screen).decode("utf-8", "replace")
    assert engine("ps", "--quiet", "--filter", f"ancestor={CPU}") == ""


def test_exit_codes_pass_through(cpu_image: SimpleNamespace, user: SimpleNamespace) -> None:
    assert user.run("scripts/run.sh", "sh", "-c", "exit 7").returncode == 7
    assert user.run("scripts/run.sh", "sh", "-c", "kill -9 $$").returncode == 137
    done = user.run("scripts/run.sh", "openpangu-sft", "merge", "--recipe", "recipes/missing.yaml")
    assert done.returncode == 1
    assert "openpangu-sft: recipes/missing.yaml: no such recipe file" in done.stderr


def test_the_caller_has_an_entry_and_a_home(cpu_image: SimpleNamespace, user: SimpleNamespace) -> None:
    asked = "id -u; id -g; getent passwd $(id -u) | cut -d: -f6; echo $HOME; touch $HOME/x && pwd; ps -o comm= 1"
    asked = asked.replace("ps -o comm= 1", "cat /proc/1/comm")
    said = user.run("scripts/run.sh", "sh", "-c", asked).stdout.splitlines()
    assert said == [str(user.uid), str(user.gid), "/home/openpangu", "/home/openpangu", str(user.clone), "docker-init"]


def test_the_default_user_is_the_owner_of_the_cache(
    engine: Engine, cpu_image: SimpleNamespace, user: SimpleNamespace
) -> None:
    engine("run", "--rm", "-v", f"{user.cache}:/cache", CPU, "touch", "/cache/made")
    assert (user.cache / "made").stat().st_uid == user.uid


@pytest.fixture
def host_with_npus(engine: Engine, cpu_image: SimpleNamespace, user: SimpleNamespace) -> Path:
    """A folder with openable device files: null devices of group 4713. The cpu image stands in for npu."""
    if os.geteuid():
        pytest.skip("only root can make device files")
    root = user.cache.parent / "root"
    (root / "dev").mkdir(parents=True)
    for name in ("davinci_manager", "devmm_svm", "hisi_hdc", "davinci0", "davinci1", "davinci2"):
        subprocess.run(["mknod", "-m", "660", str(root / "dev" / name), "c", "1", "3"], check=True)
        os.chown(root / "dev" / name, 4713, 4713)
    (root / "usr/local/sbin").mkdir(parents=True)
    (root / "usr/local/sbin/npu-smi").write_text("#!/bin/sh\necho two NPUs\n")
    (root / "usr/local/sbin/npu-smi").chmod(0o755)
    user.environment["HOST_ROOT"] = str(root)
    had_npu = engine.has(NPU)
    if not had_npu:
        engine("tag", CPU, NPU)
    yield root
    if not had_npu:
        engine("rmi", NPU)


def test_npus_can_be_opened_by_the_user(host_with_npus: Path, user: SimpleNamespace) -> None:
    asked = "ls /dev | grep -E 'davinci|devmm|hisi'; echo > /dev/davinci2 && echo opened; id -G; npu-smi"
    user.environment["NPUS"] = "0,2"
    done = user.run("scripts/run.sh", "sh", "-c", asked)
    devices = ["davinci0", "davinci2", "davinci_manager", "devmm_svm", "hisi_hdc"]
    assert done.stdout.splitlines() == [*devices, "opened", f"{user.gid} 4713", "two NPUs"]
    user.environment["NPUS"] = "3"
    done = user.run("scripts/run.sh", "true")
    assert (done.returncode, done.stderr) == (1, "openpangu-sft: NPUS=3: this host has no NPU 3 -> it has 0 1 2\n")


def compose_command(engine: Engine) -> list[str]:
    if not subprocess.run([engine.client, "compose", "version"], capture_output=True).returncode:
        return [engine.client, "compose"]
    if found := shutil.which("docker-compose"):
        return [found]
    pytest.skip("neither docker compose nor docker-compose is installed")


@pytest.mark.parametrize("service", ["cpu", "npu"])
def test_compose_starts_the_container_that_make_starts(
    engine: Engine, host_with_npus: Path, user: SimpleNamespace, service: str
) -> None:
    """All settings of the container, except this directory, which compose does not mount."""
    compose = compose_command(engine)
    user.environment.update(HOST_UID=str(user.uid), HOST_GID=str(user.gid), TARGET=service)
    assert user.run("scripts/compose.sh").returncode == 0
    assert user.run(*compose, "config", "--quiet").returncode == 0
    made = user.cache / "made"
    waits = ["sh", "-c", "touch /cache/made; sleep 60"]
    described = []
    for how in ([*compose, "run", "--rm", service], ["scripts/run.sh"]):
        started = user.popen(*how, *waits, stdin=subprocess.DEVNULL)
        try:
            described.append(container_of(engine, NPU if service == "npu" else CPU))
            for _ in range(300):  # the npu image checks torch_npu first
                if made.exists():
                    break
                time.sleep(0.1)
            assert made.stat().st_uid == user.uid
            made.unlink()
        finally:
            engine("kill", described[-1]["Id"])
            started.wait(60)
    first, second = (what_counts(container, user.clone) for container in described)
    assert first == second
    assert bool(first["devices"]) == (service == "npu")


def container_of(engine: Engine, image: str) -> dict[str, Any]:
    for _ in range(100):
        if found := engine("ps", "--quiet", "--filter", f"ancestor={image}"):
            return engine.inspect(found.split()[0])
        time.sleep(0.1)
    raise AssertionError("no container has started")


def what_counts(container: dict[str, Any], clone: Path) -> dict[str, Any]:
    config, host = container["Config"], container["HostConfig"]
    names = {"HOST_UID", "HOST_GID", "PATH"}
    return {
        "image": config["Image"],
        "command": config["Cmd"],
        "environment": sorted(pair for pair in config["Env"] if pair.split("=")[0] in names),
        "stop": config.get("StopTimeout"),
        "mounts": sorted(
            (mount["Source"], mount["Destination"], mount["RW"])
            for mount in container["Mounts"]
            if mount["Destination"] != str(clone)
        ),
        "devices": sorted((device["PathOnHost"], device["PathInContainer"]) for device in host["Devices"] or []),
        "host": [host[key] for key in ("IpcMode", "NetworkMode", "Init", "Privileged")],
    }


def test_compose_passes_exit_codes_through(engine: Engine, cpu_image: SimpleNamespace, user: SimpleNamespace) -> None:
    done = user.run(*compose_command(engine), "run", "--rm", "cpu", "openpangu-sft", "merge")
    assert done.returncode == 1
    assert "openpangu-sft: /cache/" in done.stdout + done.stderr
