"""Job descriptions for several machines."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from conftest import ROOT
from openpangu_sft import __version__
from openpangu_sft.cli.main import app
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed.cluster import volcano

RECIPE = ROOT / "recipes/openpangu-1b.yaml"
SETTINGS = ["parallel.nodes=2", "train.lr=1e-5"]


def written(*command: str) -> str:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    done = CliRunner().invoke(app, [*command, "--recipe", str(RECIPE), *settings])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_slurm_starts_training_once_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run by bash, with srun and scontrol of our own that play two machines."""
    script = tmp_path / "job.sh"
    script.write_text(written("slurm"))
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'first\\nsecond\\n'\n")
    (tools / "srun").write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n'
    )
    (tools / "make").write_text('#!/bin/sh\necho "$MASTER_ADDR $MASTER_PORT $NODE_RANK $PWD $*"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "x[1-2]"}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True, env=environment)
    command = f"sft RECIPE={RECIPE} SET={' '.join(SETTINGS)}"
    assert done.stdout.splitlines() == [f"first 6000 {number} {Path.cwd()} {command}" for number in (0, 1)]
    assert "#SBATCH --nodes=2" in script.read_text()


def test_slurm_script_is_clean() -> None:
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if not (shellcheck := shutil.which("shellcheck", path=tools)):
        assert platform.machine() != "x86_64", "shellcheck is not installed"
        pytest.skip("shellcheck is not installed: it has no wheel for this machine")
    done = subprocess.run([shellcheck, "-"], input=written("slurm"), capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_volcano_job() -> None:
    config, job = YAML(typ="safe", pure=True).load_all(written("kubernetes", "--claim", "pangu-cache"))
    assert (job["apiVersion"], job["kind"], job["spec"]["schedulerName"]) == (
        "batch.volcano.sh/v1alpha1",
        "Job",
        "volcano",
    )
    (task,) = job["spec"]["tasks"]
    assert job["spec"]["minAvailable"] == task["replicas"] == 2
    pod = task["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == f"openpangu-sft:{__version__}-npu"
    assert container["resources"]["limits"] == {"huawei.com/Ascend910": 8}
    assert pod["terminationGracePeriodSeconds"] == 600
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "pangu-cache"}} in pod["volumes"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"cache": "/cache", "recipe": "/recipe", "shm": "/dev/shm"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    names = {variable["name"]: variable["value"] for variable in container["env"]}
    assert names["MASTER_ADDR"] == f"{job['metadata']['name']}-{task['name']}-0.{job['metadata']['name']}"
    assert config["metadata"]["name"] == "openpangu-sft-recipe"


def test_volcano_job_holds_the_recipe(tmp_path: Path) -> None:
    config, _ = YAML(typ="safe", pure=True).load_all(written("kubernetes", "--claim", "x"))
    (tmp_path / "recipe.yaml").write_text(config["data"]["recipe.yaml"])
    loaded: Recipe = load_recipe(tmp_path / "recipe.yaml")
    assert loaded == load_recipe(RECIPE, SETTINGS)


def test_settings_are_text_in_yaml_whatever_they_hold() -> None:
    recipe = load_recipe(RECIPE, [*SETTINGS, "data.tool_prompt=\"{{ tools }}\\n  a: '你' # {% raw %}{% endraw %}\\n\""])
    config, job = YAML(typ="safe", pure=True).load_all(volcano(recipe, "true", 'x: "1'))
    settings = YAML(typ="safe", pure=True).load(config["data"]["recipe.yaml"])
    assert settings == recipe.model_dump(mode="json")
    pod = job["spec"]["tasks"][0]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "true"}
    assert pod["containers"][0]["image"] == 'x: "1'


def test_a_pod_takes_its_number_from_volcano() -> None:
    _, job = YAML(typ="safe", pure=True).load_all(written("kubernetes", "--claim", "x", "--image", "registry/x:1"))
    (container,) = job["spec"]["tasks"][0]["template"]["spec"]["containers"]
    assert container["image"] == "registry/x:1"
    start = container["args"][2].replace("openpangu-sft", "bash -c 'echo $NODE_RANK $*' bash")
    done = subprocess.run(["bash", "-c", start], capture_output=True, text=True, check=True, env={"VC_TASK_INDEX": "3"})
    assert done.stdout == "3 sft --recipe /recipe/recipe.yaml\n"
