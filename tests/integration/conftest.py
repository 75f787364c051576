"""What several integration tests need beside a cluster and a storage."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from fruitray.storage import open_storage
from fruitray.synthetic import photo_set
from tests.cluster import Cluster


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a weights file for mobilenet_v2, untrained: what counts here is the path it takes."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(torchvision.models.mobilenet_v2().state_dict(), folder / "mobilenet_v2.safetensors")
    return folder


@pytest.fixture
def place(aws: str, cluster: Cluster) -> str:
    """A prefix with 60 photos below raw/ and their index below index/."""
    root = f"s3://{aws}"
    raw = open_storage(f"{root}/raw")
    for key, data in photo_set(20).items():
        raw.write(key, data)
    code, printed = cluster.run("prepare", "--images", f"{root}/raw", "--out", f"{root}/index")
    assert code == 0, printed
    return root
