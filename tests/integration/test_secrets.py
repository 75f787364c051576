"""All jobs, run once as the policies of `infra/aws/iam` allow, and no secret in anything that is left of the run.

The secrets are the S3 secret key and Ray's token. They may be in the environment of processes, and the token in the
file that `RAY_AUTH_TOKEN_PATH` names; nothing else is passed over. Memory, Ray's object store too, is not looked at.
"""

import base64
import json
import math
import pickle
import secrets
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fruitray.s3server import S3Server
from fruitray.storage import open_storage
from fruitray.synthetic import photo_set
from tests.cluster import Cluster, ray_head
from tests.conftest import new_bucket
from tests.integration.test_permissions import POLICIES, Call, Gate, allows, granted, policies_of, policy
from tests.trouble import trouble_before

SMALL = ("--image-size", "64", "--epochs", "1")
ONLY_IN_NEED = {"s3:AbortMultipartUpload"}
"""What a run in which nothing goes wrong does not use."""
SHOWN = ("actors", "jobs", "nodes", "objects", "placement_groups", "runtime_envs", "tasks", "workers")
"""What Ray's dashboard shows in clear to whoever has the token."""


@dataclass
class Run:
    """What was asked of the store by each job, what it deleted there, and what is left, by place."""

    bucket: str
    secrets: dict[str, str]
    asked: dict[str, set[Call]] = field(default_factory=dict)
    deleted: dict[str, set[str]] = field(default_factory=dict)
    denied: list[tuple[str, str]] = field(default_factory=list)
    left: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture(scope="module")
def run(s3: S3Server) -> Iterator[Run]:
    """One photo set from `prepare` to `verify`, by `ray job submit`; then two jobs that are refused."""
    gate = Gate()
    with pytest.MonkeyPatch.context() as environment, trouble_before(s3.endpoint, gate) as (endpoint, _):
        root = f"s3://{(bucket := new_bucket(s3, environment))}"
        for key, data in photo_set(20).items():
            open_storage(f"{root}/raw").write(key, data)
        behind_gate = {"AWS_ENDPOINT_URL": endpoint, "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}  # no chunks
        with ray_head(s3.environment | behind_gate, dashboard=True) as cluster:
            token = (cluster.folder / "token").read_text()
            found = Run(bucket, {"the secret key": s3.secret_key, "the token": token})
            for job, arguments in _jobs(root).items():
                _run_within_bounds(found, gate, cluster, job, arguments)
            _run_refused(found, s3, cluster, root)
            found.left |= _shown(cluster, token) | _files(cluster)
            yield found


def _jobs(root: str) -> dict[str, tuple[str, ...]]:
    raw, index, tune, model, scores = (
        f"{root}/{place}" for place in ("raw", "runs/index", "runs/tune", "runs/model", "scores/1")
    )
    return {
        "prepare": ("--images", raw, "--out", index),
        "tune": ("--index", index, "--out", tune, "--backbones", "cnn", "--trials", "2", "--batch-sizes", "16", *SMALL),
        "train": ("--index", index, "--out", model, "--config", f"{tune}/best.json", "--checkpoint-minutes", "0"),
        "score": ("--package", model, "--images", raw, "--out", scores, "--shard-rows", "16"),
        "verify": ("--out", scores),
    }


def _run_within_bounds(found: Run, gate: Gate, cluster: Cluster, job: str, arguments: tuple[str, ...]) -> None:
    gate.policies, gate.asked, before = policies_of(job, found.bucket), [], _objects(found.bucket).keys()
    code, printed = cluster.submit(job, *arguments)
    assert (code, gate.denied) == (0, []), printed
    left = _objects(found.bucket)
    found.asked[job] = set(gate.asked)
    written = {call.resource for call in gate.asked if call.action == "s3:PutObject"}
    found.deleted[job] = (written | before) - left.keys()
    found.left |= left | {f"what {job} printed": printed.encode()}


def _objects(bucket: str) -> dict[str, bytes]:
    """By ARN."""
    storage = open_storage(f"s3://{bucket}")
    return {f"arn:aws:s3:::{bucket}/{entry.key}": storage.read(entry.key) for entry in storage.list()}


def _run_refused(found: Run, s3: S3Server, cluster: Cluster, root: str) -> None:
    """With a wrong secret key, and in a bucket that is not there."""
    wrong = found.secrets["the wrong key"] = secrets.token_hex(20)
    for sentence, images, keys in (
        ("the secret key is wrong", f"{root}/raw", {"AWS_SECRET_ACCESS_KEY": wrong}),
        ("there is no such bucket", f"{root}-absent/raw", {}),
    ):
        arguments = ("--images", images, "--out", f"{root}/runs/refused")
        code, printed = cluster.run("prepare", *arguments, **{"AWS_ENDPOINT_URL": s3.endpoint, **keys})
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


def test_jobs_ask_for_nothing_that_their_policies_forbid_and_use_what_they_allow(run: Run) -> None:
    assert run.denied == []
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


def leaks(places: Mapping[str, bytes], canaries: Mapping[str, str]) -> list[str]:
    """Which canary is in which place."""
    forms = {name: _forms(canary) for name, canary in canaries.items()}
    texts = ((place, _clear(data)) for place, data in places.items())
    return [
        f"{name} in {place}" for place, text in texts for name in forms if any(form in text for form in forms[name])
    ]


def _forms(canary: str) -> set[bytes]:
    """As it is, in a URL, and in base64, wherever in the encoded text it begins."""
    plain = canary.encode()
    forms = {plain, quote(canary, safe="").encode()}
    for lead in range(3):
        whole = slice(
            math.ceil(lead * 8 / 6), (lead + len(plain)) * 8 // 6
        )  # letters that its neighbours have no part in
        encoded = base64.b64encode(bytes(lead) + plain + bytes(2))[whole]
        forms |= {encoded, encoded.replace(b"+", b"-").replace(b"/", b"_")}
    return forms


def _clear(data: bytes) -> bytes:
    """With the rows and the metadata of a Parquet file uncompressed behind it."""
    if not data.startswith(b"PAR1"):
        return data
    table, sink = pq.read_table(pa.BufferReader(data)), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    rows: bytes = sink.getvalue().to_pybytes()
    return data + rows


CANARY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


def _parquet(value: str, note: str = "") -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"error": [value] * 100}).replace_schema_metadata({"note": note})
    pq.write_table(table, sink, compression="zstd", store_schema=True)
    found: bytes = sink.getvalue().to_pybytes()
    return found


@pytest.mark.parametrize(
    "data",
    [
        _parquet(f"403 for key {CANARY}"),
        _parquet("fine", f"made with {CANARY}"),
        pickle.dumps({"environment": {"AWS_SECRET_ACCESS_KEY": CANARY}}),
        json.dumps({"url": f"https://store/?key={quote(CANARY, safe='')}"}).encode(),
        *(base64.b64encode(f"{'x' * lead}{CANARY} and so on".encode()) for lead in range(3)),
        base64.urlsafe_b64encode(b"\xff" + CANARY.encode()),
    ],
    ids=["row", "metadata", "pickle", "url", "base64-0", "base64-1", "base64-2", "urlsafe"],
)
def test_a_secret_would_be_found(data: bytes) -> None:
    assert leaks({"here": data, "there": b"nothing"}, {"it": CANARY, "another": "x" * 40}) == ["it in here"]
