"""The files for Kubernetes and SkyPilot: their schemas, and the commands in them."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import config_from_args, get_args_parser
from typer.main import get_command

from losa.cli.app import app
from losa.recipe.reading import load_recipe
from tests.helpers.processes import ROOT

KUBERNETES = ROOT / "examples/kubernetes/losa-job.yaml"
SKYPILOT = ROOT / "examples/skypilot/losa.yaml"
SBATCH = "examples/slurm/losa.sbatch"
PAGES = [ROOT / page for page in ("README.md", "examples/README.md", "docs/guide/clusters.md", "docs/guide/gpus.md")]
JOB = {kind["kind"]: kind for kind in yaml.safe_load_all(KUBERNETES.read_text())}
TASK = yaml.safe_load(SKYPILOT.read_text())
VOLUME = yaml.safe_load(SKYPILOT.with_name("losa-shared.yaml").read_text())


@pytest.mark.parametrize("kind", JOB)
def test_kubernetes_takes_it(kind):
    """Strictly: unknown keys are errors. podFailurePolicy is stable since 1.31."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(JOB[kind], "1.31", strict=True)
    broken = {**JOB[kind], "spec": {**JOB[kind]["spec"], "unknownKey": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="unknownKey"):
        kubernetes_validate.validate(broken, "1.31", strict=True)


def test_the_pods_of_the_job_find_each_other():
    spec = JOB["Job"]["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    name, service = JOB["Job"]["metadata"]["name"], JOB["Service"]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    launch, _ = launched(container["args"][0], JOB_COMPLETION_INDEX="0")
    assert launch.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
    assert int(launch.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(launch.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]]
    assert JOB["PersistentVolumeClaim"]["metadata"]["name"] in claims
    # The default class is mostly of disks that one node mounts.
    assert JOB["PersistentVolumeClaim"]["spec"]["storageClassName"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


@pytest.fixture
def sky_schemas(monkeypatch) -> ModuleType:
    """SkyPilot's own schemas, without all that the package itself imports."""
    pytest.importorskip("jsonschema")
    try:
        folder = distribution("skypilot").locate_file("sky")
    except importlib.metadata.PackageNotFoundError:
        assert not (Path(sys.prefix) / ".installed").exists(), "make installs skypilot"
        pytest.skip("skypilot is not installed")
    before = set(sys.modules)
    package = ModuleType("sky")
    package.__path__, package.__version__, package.__commit__ = [str(folder)], "0", ""
    monkeypatch.setitem(sys.modules, "sky", package)
    for name in ("skylet.autostop_lib", "setup_files.dependencies", "server.daemons", "utils.volume"):
        monkeypatch.setitem(sys.modules, f"sky.{name}", MagicMock())
    yield importlib.import_module("sky.utils.schemas")
    for name in set(sys.modules) - before:
        if name.startswith("sky."):
            monkeypatch.delitem(sys.modules, name)


def test_skypilot_takes_it(sky_schemas):
    from jsonschema import Draft7Validator, ValidationError

    Draft7Validator(sky_schemas.get_task_schema()).validate(TASK)
    Draft7Validator(sky_schemas.get_resources_schema()).validate(TASK["resources"])
    Draft7Validator(sky_schemas.get_volume_schema()).validate(VOLUME)
    with pytest.raises(ValidationError, match="num_node'"):
        Draft7Validator(sky_schemas.get_task_schema()).validate(TASK | {"num_node": 2})
    with pytest.raises(ValidationError, match="accelerator'"):
        Draft7Validator(sky_schemas.get_resources_schema()).validate({"accelerator": "H100"})


def test_all_nodes_of_the_task_mount_the_volume():
    assert list(TASK["volumes"].values()) == [VOLUME["name"]]
    assert (TASK["resources"]["infra"], VOLUME["type"]) == (VOLUME["infra"], "k8s-pvc")
    assert VOLUME["config"]["access_mode"] == "ReadWriteMany"
    environment = re.findall(r"~/\S+/bin/activate$", TASK["setup"] + TASK["run"], re.MULTILINE)
    assert len(environment) == 2 and len(set(environment)) == 1


def check_started(read) -> None:
    """``losa`` itself is started: ``-m losa`` would run the source tree in the current directory, in which there are no
    native libraries after ``pip install .``."""
    assert read.no_python and not read.module and read.training_script == "losa"


def launched(shell: str, **variables: str):
    """What a shell command gives to torchrun: its own options and the words behind them, as torchrun reads them."""
    show = 'source() { :; }\ntorchrun() { "$PYTHON" -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"; }\n'
    environment = os.environ | variables | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "-euc", show + shell.replace("exec torchrun", "torchrun")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    launch = get_args_parser().parse_args(json.loads(done.stdout))
    check_started(launch)
    return launch, launch.training_script_args


def takes(words: list[str]) -> dict:
    """What losa makes of the words of ``losa run``; the recipe is one that there is."""
    command = get_command(app).commands[words[0]]
    options = command.make_context(words[0], words[1:]).params
    assert words[0] == "run" and options["resume"]
    load_recipe(ROOT / options["recipe"])
    return options


@pytest.mark.parametrize("index", [0, 1])
def test_the_commands_of_a_node(index):
    shell = JOB["Job"]["spec"]["template"]["spec"]["containers"][0]["args"][0]
    kubernetes, words = launched(shell, JOB_COMPLETION_INDEX=str(index))
    options = takes(words)
    assert options["output"] == Path("/shared/runs/llama2-70b-wanda70")
    assert load_recipe(ROOT / options["recipe"]).distributed.mode in ("fsdp", "hsdp")

    variables = {
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NUM_NODES": str(TASK["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": TASK["resources"]["accelerators"].split(":")[1],
        "SKYPILOT_NODE_RANK": str(index),
        "SKYPILOT_TASK_ID": "sky-2026-01-01-12-00-00-000000_losa_1-0",
    }
    sky, words = launched(TASK["run"], **variables, **TASK["envs"])
    assert takes(words)["output"] == Path(TASK["envs"]["OUTPUT"])
    assert (sky.rdzv_endpoint, sky.local_addr) == ("10.0.0.7:29500", f"10.0.0.{7 + index}")
    for launch in (kubernetes, sky):
        config, _, _ = config_from_args(launch)
        assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
        assert config.rdzv_backend == "c10d" and config.rdzv_configs["is_host"] == str(int(index == 0))
        # How long a node waits for node 0's store, and then for all nodes. torchrun's own 60 s are too few for a store
        # whose machine is yet to come.
        assert {config.rdzv_configs[key] for key in ("read_timeout", "join_timeout")} == {"3600"}
    assert {"SIGTERM", "SIGUSR1"} <= set(kubernetes.signals_to_handle.split(","))
    spec = JOB["Job"]["spec"]
    given = {entry["name"] for entry in spec["template"]["spec"]["containers"][0]["env"]}
    # Without it torchrun 2.11 to 2.13 hands the store of the dead processes to those that it starts again.
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in given & set(TASK["envs"])
    # What the page says of restarts.
    page = (ROOT / "docs/guide/clusters.md").read_text()
    limit, nodes = spec["backoffLimit"], spec["completions"]
    assert limit == 4 * nodes and f"`backoffLimit` ({limit}, four for each" in page
    assert f"`--max-restarts` ({kubernetes.max_restarts})" in page
    assert f"in place {kubernetes.max_restarts} times; then all pods fail" in page
    again = TASK["resources"]["job_recovery"]["max_restarts_on_errors"]
    assert f"in place {sky.max_restarts} times, then {again} times anew" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_launchers_of_a_page_take_their_options(page):
    fences = "\n".join(re.findall(r"^```(?:bash)?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
    lines = fences.replace("\\\n", " ")
    found = re.findall(r"^(torchrun|accelerate launch|sbatch) (.*)$", lines, re.MULTILINE)
    assert found
    for launcher, rest in found:
        words = shlex.split(rest, comments=True)
        if launcher == "sbatch":
            script = words.index(SBATCH)
            known = "|".join(("nodes", "gres", "ntasks-per-node", "cpus-per-task", "mem"))
            assert all(re.fullmatch(rf"--({known})=[\w:]+", word) for word in words[:script]), words
            takes(["run", *words[script + 1 :], "--resume"])
        else:
            parser = get_args_parser() if launcher == "torchrun" else launch_command_parser()
            check_started(parser.parse_args(words))
