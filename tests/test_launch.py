"""The launch files: linted, loaded by their own tools, and with flags that exist."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from attnlab.runner.request import FLAG_MODES

LAUNCH = Path(__file__).parents[1] / "launch"
FILES = sorted(LAUNCH.iterdir())
TOOLS = {".sh": ["shellcheck"], "": ["hadolint"]}


def tool(name):
    """Return the path of a tool installed in this environment or on the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


@pytest.mark.parametrize("file", [file for file in FILES if file.suffix in TOOLS], ids=lambda file: file.name)
def test_linter_finds_nothing(file):
    (name,) = TOOLS[file.suffix]
    assert tool(name) is not None, f"{name} is not installed (extra `test`)"
    done = subprocess.run([tool(name), file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_is_short_and_its_flags_exist(file):
    text = file.read_text()
    assert len(text.splitlines()) < 60
    commands = re.findall(r"(?:run\.py|launch/\S+\.sh|- )((?:\s*\\?\s*--[a-z_.]+\S*)+)", text)
    flags = {name for command in commands for name in re.findall(r"--([a-z_]+)", command)}
    assert flags - set(FLAG_MODES) - {"config"} == set()


def test_skypilot_loads_its_file():
    if find_spec("sky") is None:
        pytest.skip("needs skypilot (extra `launch`)")
    import sky

    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    (resources,) = task.resources
    assert task.num_nodes == 2 and resources.accelerators == {"H100": 8} and resources.use_spot
    for variable in ("SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"):
        assert f"${variable}" in task.run


# The fields of a JobSet (jobset.x-k8s.io/v1alpha2), batch/v1 Job and v1 Pod that the file may use.
POD = {
    "restartPolicy": {"Never", "OnFailure"},
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {str: str},
    "containers": [
        {
            "name": str,
            "image": str,
            "args": [str],
            "resources": {"requests": {str: int}, "limits": {str: int}},
        }
    ],
}
JOB = {"parallelism": int, "completions": int, "backoffLimit": int, "template": {"spec": POD}}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def violations(value, schema, path="jobset"):
    """Return the fields that a schema lacks, and those of another type or value."""
    if isinstance(schema, set):
        return [] if value in schema else [path]
    if isinstance(schema, type):
        return [] if type(value) is schema else [path]
    if type(value) is not type(schema):
        return [path]
    if isinstance(schema, list):
        return [bad for i, item in enumerate(value) for bad in violations(item, schema[0], f"{path}[{i}]")]
    found = []
    for key, item in value.items():
        known = key if key in schema else type(key)
        found += violations(item, schema[known], f"{path}.{key}") if known in schema else [f"{path}.{key}"]
    return found


def test_jobset_has_only_fields_of_its_schema():
    document = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert violations(document, JOBSET) == []
    job = document["spec"]["replicatedJobs"][0]
    job["replica"] = job.pop("replicas")
    job["template"]["spec"]["completions"] = "4"
    expected = ["template.spec.completions", "replica"]
    assert violations(document, JOBSET) == [f"jobset.spec.replicatedJobs[0].{name}" for name in expected]


def test_jobset_has_one_pod_for_each_host():
    document = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert document["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    (replicated,) = document["spec"]["replicatedJobs"]
    assert replicated.keys() == {"name", "replicas", "template"}
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    assert rows * columns == chips * job["completions"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
