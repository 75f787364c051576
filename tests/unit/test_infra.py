"""What `infra` says is what its readers (Ray's cluster launcher) understand, and opens no door."""

import re
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster import ROOT

INFRA = ROOT / "infra"


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((INFRA / "aws" / "cluster.yaml").read_text())
    return config


def test_ray_up_understands_the_cluster(aws: dict[str, Any]) -> None:
    validate_config(prepare_config(aws))


def test_the_head_does_no_work_and_workers_are_spot_machines(aws: dict[str, Any]) -> None:
    kinds = aws["available_node_types"]
    head = kinds.pop(aws["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert {kind["node_config"]["InstanceMarketOptions"]["MarketType"] for kind in kinds.values()} == {"spot"}
    assert all(kind["min_workers"] == 0 for kind in kinds.values())
    assert "InstanceMarketOptions" not in head["node_config"]


def test_machines_have_no_public_address_no_keys_and_a_role_of_their_own(aws: dict[str, Any]) -> None:
    assert aws["provider"]["use_internal_ips"] is True
    for name, kind in aws["available_node_types"].items():
        config = kind["node_config"]
        assert config["SubnetIds"], name
        assert config["SecurityGroupIds"], "the one that Ray would make takes SSH from everywhere"
        assert config["IamInstanceProfile"]["Name"] == ("fruitray-head" if name == "head" else "fruitray-worker")
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        assert all(device["Ebs"]["Encrypted"] for device in config["BlockDeviceMappings"])
    assert re.search(r"@sha256:\w+$", aws["docker"]["image"]), "a tag can be another image tomorrow"


def test_every_node_asks_for_the_token_and_the_dashboard_is_on_loopback(aws: dict[str, Any]) -> None:
    for commands in (aws["head_start_ray_commands"], aws["worker_start_ray_commands"]):
        [start] = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):  # a private subnet reaches its own region's S3 alone
            assert f"{name}={aws['provider']['region']}" in start
    head = " ".join(aws["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "FRUITRAY_GROWING_CLUSTER=1" in head, "else a job is refused as long as there is no worker"


def test_no_secret_is_written_down() -> None:
    secret = re.compile(r"AKIA[0-9A-Z]{16}|aws_secret_access_key\s*[:=]|BEGIN [A-Z ]*PRIVATE KEY")
    assert [path for path in INFRA.rglob("*") if path.is_file() and secret.search(path.read_text())] == []
