"""The policies of `infra/aws/iam` allow what is asked by our code and by Ray's, and no more that matters.

Here: reading a policy as AWS does, as far as ours go, and a gate before an S3 server that forbids what they do not
allow; the jobs run behind it in `tests/e2e/test_jobs.py`. What AWS itself says of the policies is not tested.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from fruitray.errors import AccessDeniedError
from fruitray.s3server import S3Server
from fruitray.storage import open_storage
from tests.cluster import ROOT
from tests.trouble import trouble_before

Policy = dict[str, Any]
IAM = ROOT / "infra" / "aws" / "iam"
READS_AND_WRITES = ("read-photos", "write-runs")
POLICIES = {
    "prepare": READS_AND_WRITES,
    "tune": READS_AND_WRITES,
    "train": READS_AND_WRITES,
    "score": ("read-photos", "read-runs", "write-scores"),
    "verify": ("write-scores",),
    "export": READS_AND_WRITES,
    "report": ("read-photos", "read-runs", "write-scores"),
}
"""What each job needs, where photos lie below raw/, scores below scores/, and all else below runs/."""
ACCOUNT, REGION = "123456789012", "eu-central-1"


class Call(NamedTuple):
    """One question that AWS asks of the policies."""

    action: str
    resource: str
    context: tuple[tuple[str, str], ...] = ()


def policy(name: str, **placeholders: str) -> Policy:
    """The policy with its placeholders (`BUCKET="my-bucket"`) filled in."""
    text = (IAM / f"{name}.json").read_text()
    for placeholder, value in placeholders.items():
        text = text.replace(placeholder.replace("_", "-"), value)
    found: Policy = json.loads(text)
    return found


def policies_of(job: str, bucket: str) -> list[Policy]:
    """Of the job's role, and of the bucket."""
    return [policy(name, BUCKET=bucket) for name in (*POLICIES[job], "bucket")]


def allows(policies: Iterable[Policy], call: Call) -> bool:
    """Whether some statement allows it, and none denies it."""
    effects = {
        statement["Effect"] for policy in policies for statement in policy["Statement"] if _applies(statement, call)
    }
    return effects == {"Allow"}


_OPERATORS = {
    "StringEquals": lambda value, wanted: value in wanted,
    "Bool": lambda value, wanted: value in wanted,
    "StringLikeIfExists": lambda value, wanted: value is None or _is_like(wanted, value),
}
"""Those that our policies use; another is a KeyError."""


def _applies(statement: Policy, call: Call) -> bool:
    context = dict(call.context)
    return (
        _is_like(_listed(statement["Action"]), call.action)
        and _is_like(_listed(statement["Resource"]), call.resource)
        and all(
            _OPERATORS[operator](context.get(key), _listed(wanted))
            for operator, keys in statement.get("Condition", {}).items()
            for key, wanted in keys.items()
        )
    )


def _listed(element: str | list[str]) -> list[str]:
    return [element] if isinstance(element, str) else element


def _is_like(patterns: list[str], value: str) -> bool:
    expressions = [re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".") for pattern in patterns]
    return any(re.fullmatch(expression, value, re.DOTALL) for expression in expressions)


_OF_OBJECTS = {
    "GET": "GetObject",
    "HEAD": "GetObject",
    "PUT": "PutObject",
    "POST": "PutObject",
    "DELETE": "DeleteObject",
}
"""POST begins and completes an upload in parts."""


def asked_of_s3(method: str, path: str) -> list[Call]:
    """What AWS would ask the policies about an HTTP request. The keys of a `POST ?delete` are in its body, so it asks
    nothing here: who reads this looks for what is gone."""
    url = urlsplit(path)
    if unquote(url.path) == _NOBODYS_BUCKET:
        return []
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    bucket, _, key = unquote(url.path)[1:].partition("/")
    secure = (("aws:SecureTransport", "true"),)
    prefix = (("s3:prefix", query["prefix"]),) if "prefix" in query and not key else ()
    see = Call("s3:ListBucket", f"arn:aws:s3:::{bucket}", secure + prefix)
    if not key:
        if method in ("GET", "HEAD") and not query.keys() - _OF_A_LISTING:
            return [see]
        if method == "POST" and "delete" in query:
            return []
        return [Call(f"s3:{method} {'&'.join(query)}", see.resource, secure)]  # nothing that we allow
    action = "AbortMultipartUpload" if method == "DELETE" and "uploadId" in query else _OF_OBJECTS[method]
    call = Call(f"s3:{action}", f"{see.resource}/{key}", secure)
    return [call, see] if method in ("GET", "HEAD") else [call]  # else a missing object would be a forbidden one


_NOBODYS_BUCKET = "/$extremelyunlikelytoexist$"
"""pyarrow asks for it once, to see from the refusal what kind of store it has."""
_OF_A_LISTING = {"prefix", "list-type", "delimiter", "max-keys", "encoding-type", "continuation-token", "start-after"}
_OF_A_LISTING |= {"fetch-owner", "x-id"}


class Gate:
    """A `Trouble` that forbids what `policies` do not allow, and keeps what it has `asked` and what was `denied`."""

    def __init__(self) -> None:
        self.policies: list[Policy] = []
        self.asked: list[Call] = []
        self.denied: list[tuple[str, str]] = []

    def __call__(self, method: str, path: str, _: int) -> str:
        calls = asked_of_s3(method, path)
        self.asked += calls
        if all(allows(self.policies, call) for call in calls):
            return ""
        self.denied.append((method, path))
        return "denied"


def granted(policy: Policy) -> set[str]:
    """The actions that it allows anywhere."""
    return {action for statement in policy["Statement"] for action in _listed(statement["Action"])}


def _of_object(action: str, key: str, secure: str = "true") -> Call:
    return Call(f"s3:{action}", f"arn:aws:s3:::b/{key}", (("aws:SecureTransport", secure),))


@pytest.mark.parametrize("job", POLICIES)
def test_no_job_may_do_what_it_has_no_need_of(job: str) -> None:
    policies = policies_of(job, "b")
    writes = "scores/" if job in ("score", "verify", "report") else "runs/"
    for prefix in ("raw/", "scores/", "runs/", "other/", "", "raw-2/"):
        assert allows(policies, _of_object("PutObject", f"{prefix}x")) == (prefix == writes)
        assert not allows(policies, _of_object("DeleteObject", f"{prefix}x"))
        for passing in ("checkpoints", "_ray"):
            deletes = allows(policies, _of_object("DeleteObject", f"{prefix}model/{passing}/x"))
            assert deletes == (prefix == writes == "runs/")
    assert not allows(policies, _of_object("GetObject", "other/x"))
    for action in ("PutObjectAcl", "BypassGovernanceRetention", "DeleteObjectVersion"):
        assert not allows(policies, _of_object(action, f"{writes}x"))
    for action in ("DeleteBucket", "PutBucketPolicy", "PutLifecycleConfiguration"):
        assert not allows(policies, Call(f"s3:{action}", "arn:aws:s3:::b"))
    for prefix in ("", "other/", "raw"):
        assert not any(allows(policies, call) for call in asked_of_s3("GET", f"/b?list-type=2&prefix={prefix}"))
    assert allows(policies, _of_object("GetObject", f"{writes}x"))
    assert not allows(policies, _of_object("GetObject", f"{writes}x", secure="false")), "nothing in clear"
    assert not allows(policies, Call("s3:GetObject", f"arn:aws:s3:::another/{writes}x"))


def test_what_is_forbidden_is_refused_in_one_sentence(s3: S3Server, aws: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the gate does bite, and our code says what happened."""
    open_storage(f"s3://{aws}/raw").write("a b/%/ü.jpg", b"photo")
    gate = Gate()
    with trouble_before(s3.endpoint, gate) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        photos, scores = open_storage(f"s3://{aws}/raw"), open_storage(f"s3://{aws}/scores")
        gate.policies = policies_of("score", aws)
        photos.check()
        assert [entry.key for entry in photos.list()] == ["a b/%/ü.jpg"]
        assert photos.read("a b/%/ü.jpg") == b"photo"
        assert not photos.exists("missing.jpg")
        assert scores.creates_once("probe")
        assert gate.denied == []
        for forbidden in (lambda: photos.write("x", b""), lambda: scores.delete("probe")):
            with pytest.raises(AccessDeniedError, match="access denied"):
                forbidden()
        with pytest.raises(AccessDeniedError):
            open_storage(f"s3://{aws}").check()
        assert scores.exists("probe")


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of moto's EC2, where all of boto3 leads."""
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with mock_aws():
        yield boto3.client("ec2", region_name=REGION)


def test_the_head_may_start_and_end_the_workers_of_its_cluster_alone(ec2: Any) -> None:
    """Ray's own node provider starts a worker as `cluster.yaml` says; each call of it is put to the policy."""
    image, subnet = ec2.describe_images()["Images"][0]["ImageId"], ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    head = [policy("head", ACCOUNT=ACCOUNT, ami_BASE=image, subnet_PRIVATE=subnet)]
    cluster = yaml.safe_load((ROOT / "infra" / "aws" / "cluster.yaml").read_text())
    node = cluster["available_node_types"]["cpu"]["node_config"]
    profile = node["IamInstanceProfile"]["Name"]
    iam = boto3.client("iam")
    iam.create_instance_profile(InstanceProfileName=profile)
    ec2.create_key_pair(KeyName=f"ray-autoscaler_{REGION}")
    group = ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]
    node |= {"ImageId": image, "SubnetIds": [subnet], "SecurityGroupIds": [group]}
    node |= {"KeyName": f"ray-autoscaler_{REGION}"}  # which Ray makes

    provider = AWSNodeProvider(cluster["provider"], cluster["cluster_name"])
    asked: list[tuple[str, dict[str, Any]]] = []
    for resource in (provider.ec2, provider.ec2_fail_fast):
        resource.meta.client.meta.events.register(
            "before-call.ec2", lambda model, params, **_: asked.append((model.name, params["body"]))
        )
    provider.create_node(node, {"ray-node-type": "worker"}, 1)
    [worker] = provider.non_terminated_nodes({})
    provider.set_node_tags(worker, {"ray-node-status": "up-to-date"})
    provider.terminate_nodes([worker])
    assert provider.non_terminated_nodes({}) == []

    calls = [call for name, body in asked for call in _asked_of_ec2(name, body, "fruitray")]
    assert [call for call in calls if not allows(head, call)] == []
    assert {call.action for call in calls} == granted(head[0])
    for name, body in asked:
        if name != "DescribeInstances":
            others = _asked_of_ec2(name, body | {"TagSpecification.1.Tag.1.Value": "another"}, "another")
            assert not all(allows(head, call) for call in others), "of another cluster"
    for role in ("fruitray-head", "admin"):
        body = dict(asked[0][1]) | {"IamInstanceProfile.Name": role}
        assert not all(allows(head, call) for call in _asked_of_ec2("RunInstances", body, "fruitray"))


def _asked_of_ec2(name: str, body: dict[str, Any], cluster: str) -> Iterator[Call]:
    """What AWS would ask about a call on machines of `cluster`: of one that starts any, once for each of its parts."""
    arn, action = f"arn:aws:ec2:{REGION}:{ACCOUNT}:", f"ec2:{name}"
    if name == "DescribeInstances":
        yield Call(action, "*")
    elif name != "RunInstances":
        machines = [value for key, value in body.items() if re.fullmatch(r"(Instance|Resource)Id\.\d+", key)]
        yield from [
            Call(action, f"{arn}instance/{one}", (("aws:ResourceTag/ray-cluster-name", cluster),)) for one in machines
        ]
    else:
        assert body["TagSpecification.1.Tag.1.Key"] == "ray-cluster-name"
        tags = (("aws:RequestTag/ray-cluster-name", body["TagSpecification.1.Tag.1.Value"]),)
        yield Call(action, f"{arn}instance/*", tags)
        yield Call("ec2:CreateTags", f"{arn}instance/*", (("ec2:CreateAction", name), *tags))
        role = f"arn:aws:iam::{ACCOUNT}:role/{body['IamInstanceProfile.Name']}"
        yield Call("iam:PassRole", role, (("iam:PassedToService", "ec2.amazonaws.com"),))
        yield Call(action, f"arn:aws:ec2:{REGION}::image/{body['ImageId']}")
        parts = (f"subnet/{body['SubnetId']}", f"key-pair/{body['KeyName']}", "security-group/sg-1")
        yield from [Call(action, arn + part) for part in (*parts, "network-interface/*", "volume/*")]
