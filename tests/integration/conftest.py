"""What several integration tests need beside a cluster and a storage."""

from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from fruitray.index import Index, read_index, write_index
from fruitray.s3server import S3Server
from fruitray.storage import open_storage
from fruitray.synthetic import photo_set
from tests.cluster import Cluster
from tests.conftest import new_bucket


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a weights file for mobilenet_v2, untrained: what counts here is the path it takes."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(torchvision.models.mobilenet_v2().state_dict(), folder / "mobilenet_v2.safetensors")
    return folder


@pytest.fixture(scope="session")
def drawn(s3: S3Server, cluster: Cluster) -> tuple[dict[str, bytes], Index]:
    """60 photos by key, and what `prepare` says of them."""
    photos = photo_set(20)
    with pytest.MonkeyPatch.context() as environment:
        root = f"s3://{new_bucket(s3, environment)}"
        _write(f"{root}/raw", photos)
        code, printed = cluster.run("prepare", "--images", f"{root}/raw", "--out", f"{root}/index")
        assert code == 0, printed
        return photos, read_index(f"{root}/index")


@pytest.fixture
def place(aws: str, drawn: tuple[dict[str, bytes], Index]) -> str:
    """A prefix with 60 photos below raw/ and their index below index/."""
    photos, index = drawn
    root = f"s3://{aws}"
    _write(f"{root}/raw", photos)
    uris = pc.replace_substring(index.table["uri"], index.images, f"{root}/raw")
    table = index.table.set_column(index.table.column_names.index("uri"), "uri", uris)
    write_index(open_storage(f"{root}/index"), table, f"{root}/raw")
    return root


def _write(uri: str, photos: dict[str, bytes]) -> None:
    storage = open_storage(uri)
    for key, data in photos.items():
        storage.write(key, data)
