"""The whole path as a person walks it on a cluster: `ray job submit` of every job, photos and outputs in S3.

Each job may do there what the policies of `infra/aws/iam` allow it, and no secret may be in anything that is left of
the run. The secrets are the S3 secret key and Ray's token. They may be in the environment of processes, and the token
in the file that `RAY_AUTH_TOKEN_PATH` names; nothing else is passed over. Memory, Ray's object store too, is not seen.
"""

import json
import re
import secrets
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fruitray.package import load_package
from fruitray.s3server import S3Server
from fruitray.storage import open_storage
from tests.canaries import leaks
from tests.cluster import Cluster, ray_head
from tests.conftest import new_bucket
from tests.integration.test_permissions import POLICIES, Call, Gate, allows, granted, policies_of, policy
from tests.trouble import trouble_before
from tests.unit.photos import sixty

PHOTOS = sixty()
"""60, two of them corrupt."""
SMALL = ("--image-size", "64", "--epochs", "1")
COST = ("--cost-per-hour", "1")
ONLY_IN_NEED = {"s3:AbortMultipartUpload"}
"""What a run in which nothing goes wrong does not use."""
ALL = {"Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
SHOWN = ("actors", "jobs", "nodes", "objects", "placement_groups", "runtime_envs", "tasks", "workers")
"""What Ray's dashboard shows in clear to whoever has the token."""


@dataclass
class Run:
    """What each job said, asked of the store and deleted there, and what is left, by place."""

    root: str
    cluster: Cluster
    secrets: dict[str, str]
    logs: dict[str, str] = field(default_factory=dict)
    asked: dict[str, set[Call]] = field(default_factory=dict)
    deleted: dict[str, set[str]] = field(default_factory=dict)
    left: dict[str, bytes] = field(default_factory=dict)

    @property
    def bucket(self) -> str:
        return self.root.removeprefix("s3://")

    def objects(self) -> dict[str, bytes]:
        """By ARN."""
        storage = open_storage(self.root)
        return {f"arn:aws:s3:::{self.bucket}/{entry.key}": storage.read(entry.key) for entry in storage.list()}


@pytest.fixture(scope="module")
def run(s3: S3Server) -> Iterator[Run]:
    """One photo set from `prepare` to `export`, by `ray job submit`; then two jobs that are refused."""
    gate = Gate()
    with pytest.MonkeyPatch.context() as environment, trouble_before(s3.endpoint, gate) as (endpoint, _):
        root = f"s3://{new_bucket(s3, environment)}"
        for key, data in PHOTOS.items():
            open_storage(f"{root}/raw").write(key, data)
        behind_gate = {"AWS_ENDPOINT_URL": endpoint, "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}  # no chunks
        with ray_head(s3.environment | behind_gate, dashboard=True) as cluster:
            token = (cluster.folder / "token").read_text()
            found = Run(root, cluster, {"the secret key": s3.secret_key, "the token": token})
            for job, arguments in _jobs(root).items():
                _run_within_bounds(found, gate, job, arguments)
            _run_refused(found, s3)
            found.left |= _shown(cluster, token) | _files(cluster)
            gate.policies = [ALL]
            yield found


def _jobs(root: str) -> dict[str, tuple[str, ...]]:
    raw, index, tune, model, export, scores = (
        f"{root}/{place}" for place in ("raw", "runs/index", "runs/tune", "runs/model", "runs/export", "scores/1")
    )
    final = ("--config", f"{tune}/best.json", "--workers", "2", "--checkpoint-minutes", "0")
    return {
        "prepare": ("--images", raw, "--out", index),
        "tune": ("--index", index, "--out", tune, "--backbones", "cnn", "--trials", "2", "--batch-sizes", "16", *SMALL),
        "train": ("--index", index, "--out", model, *final),
        "score": ("--package", model, "--images", raw, "--out", scores, "--shard-rows", "16", "--top-k", "2", *COST),
        "verify": ("--out", scores),
        "export": ("--package", model, "--images", raw, "--out", export, "--format", "torch"),
        "report": ("--runs", scores),
    }


def _run_within_bounds(found: Run, gate: Gate, job: str, arguments: tuple[str, ...]) -> None:
    gate.policies, gate.asked, before = policies_of(job, found.bucket), [], found.objects().keys()
    code, found.logs[job] = found.cluster.submit(job, *arguments)
    assert (code, gate.denied) == (0, []), found.logs[job]
    left = found.objects()
    found.asked[job] = set(gate.asked)
    written = {call.resource for call in gate.asked if call.action == "s3:PutObject"}
    found.deleted[job] = (written | before) - left.keys()
    found.left |= left | {f"what {job} printed": found.logs[job].encode()}


def _run_refused(found: Run, s3: S3Server) -> None:
    """With a wrong secret key, and in a bucket that is not there."""
    wrong = found.secrets["the wrong key"] = secrets.token_hex(20)
    for sentence, images, keys in (
        ("the secret key is wrong", f"{found.root}/raw", {"AWS_SECRET_ACCESS_KEY": wrong}),
        ("there is no such bucket", f"{found.root}-absent/raw", {}),
    ):
        arguments = ("--images", images, "--out", f"{found.root}/runs/refused")
        code, printed = found.cluster.run("prepare", *arguments, **{"AWS_ENDPOINT_URL": s3.endpoint, **keys})
        assert (code, sentence in printed) == (6, True), printed
        found.left[f"what was printed where {sentence}"] = printed.encode()


def _shown(cluster: Cluster, token: str) -> dict[str, bytes]:
    """By the dashboard, and by the system of the processes that run."""
    shown = {}
    for path in ("api/jobs/", *(f"api/v0/{kind}?detail=true&limit=10000" for kind in SHOWN)):
        asked = urllib.request.Request(f"{cluster.dashboard}/{path}", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            shown[path] = answer.read()
    commands = [process.cmdline() for process in cluster.processes("")]
    return shown | {"command lines": json.dumps(commands).encode()}


def _files(cluster: Cluster) -> dict[str, bytes]:
    paths = [path for path in cluster.folder.rglob("*") if path.is_file() and path != cluster.folder / "token"]
    return {str(path): path.read_bytes() for path in paths}


def test_every_job_runs_by_job_submit_from_photos_to_verified_scores(run: Run) -> None:
    raw, runs, out = f"{run.root}/raw", f"{run.root}/runs", open_storage(f"{run.root}/scores/1")
    for job, log in run.logs.items():
        assert f"{job}: " in log, "the closing line says what was written where"
    for job, place in {
        "prepare": "runs/index",
        "tune": "runs/tune",
        "train": "runs/model",
        "score": "scores/1",
    }.items():
        told = json.loads(open_storage(f"{run.root}/{place}").read("status.json"))
        assert (told["job"], told["state"], told["exit_code"]) == (job, "succeeded", 0)
        assert told["said"] in run.logs[job]
    parts = sorted(entry.key for entry in out.list("data/"))
    rows = pa.concat_tables(pq.read_table(pa.BufferReader(out.read(key))) for key in parts)
    assert sorted(rows["uri"].to_pylist()) == sorted(f"{raw}/{key}" for key in PHOTOS)
    errors = rows.filter(pc.equal(rows["status"], "error"))
    assert sorted(errors["error_code"].to_pylist()) == ["E_NOT_IMAGE", "E_TRUNCATED"]
    assert all(len(labels) == 2 for labels in rows.filter(pc.equal(rows["status"], "ok"))["top_labels"].to_pylist())
    assert "60 inputs, one row each (2 errors)" in run.logs["verify"]
    scored = dict(zip(rows["uri"].to_pylist(), rows["confidence"].to_pylist(), strict=True))
    known = pq.read_table(pa.BufferReader(open_storage(f"{runs}/model").read("predictions.parquet"))).to_pylist()
    assert [scored[row["uri"]] for row in known] == pytest.approx([row["confidence"] for row in known], abs=0.02)
    assert load_package(f"{runs}/model").classes == ("cherry", "strawberry", "tomato")
    metrics = json.loads(out.read("metrics.json"))
    right = sum(row["label"] == Path(row["uri"]).parent.name for row in rows.to_pylist())
    assert (metrics["photos"], metrics["accuracy"]) == (58, right / 58), "the folders have the classes' names"
    assert b"cost_per_1000" in out.read("report.html")
    tune = open_storage(f"{runs}/tune")
    trials = pq.read_table(pa.BufferReader(tune.read("trials.parquet")))
    assert len(set(trials["initial_state_hash"].to_pylist())) == 1, "all trials of a backbone start alike"
    assert json.loads(tune.read("best.json"))["model"]["backbone"] == "cnn"


def test_jobs_ask_for_nothing_that_their_policies_forbid_and_use_what_they_allow(run: Run) -> None:
    """The former was seen to while they ran, but for what they deleted by the thousand."""
    for job, deleted in run.deleted.items():
        calls = {Call("s3:DeleteObject", arn, (("aws:SecureTransport", "true"),)) for arn in deleted}
        run.asked[job] |= calls
        assert [call for call in calls if not allows(policies_of(job, run.bucket), call)] == [], job
    assert run.deleted["train"], "checkpoints that are no longer needed"
    assert not run.deleted["score"]
    for name in {name for names in POLICIES.values() for name in names}:
        document = policy(name, BUCKET=run.bucket)
        calls = {call for job, names in POLICIES.items() if name in names for call in run.asked[job]}
        used = {call.action for call in calls if allows([document], call)}
        assert granted(document) - used <= ONLY_IN_NEED, name


def test_no_secret_is_left_behind(run: Run) -> None:
    assert leaks(run.left, run.secrets) == []
    names = "\n".join(run.left)
    for some in ("/raw/cherry/", "/index.parquet", "/trials.parquet", "/tuner.pkl", "/model.safetensors", "/_SUCCESS"):
        assert some in names, "all was looked at"
    for some in ("/status.json", "/logs/job-driver-", "/logs/raylet.out", "/logs/runtime_env", "/logs/worker-"):
        assert some in names, "all was looked at"
    for job in POLICIES:
        assert f"jobs.{job}".encode() in run.left["api/jobs/"]


def test_a_failing_job_is_reported_with_its_exit_code(run: Run) -> None:
    code, log = run.cluster.submit("prepare", "--images", f"{run.root}/nothing", "--out", f"{run.root}/runs/none")
    assert code == 1, "`ray job submit` knows only success and failure"
    assert re.search(r"exit code 3\b", log), log
