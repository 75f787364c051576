"""What several integration tests need beside a cluster and a storage."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a weights file for mobilenet_v2, untrained: what counts here is the path it takes."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(torchvision.models.mobilenet_v2().state_dict(), folder / "mobilenet_v2.safetensors")
    return folder
