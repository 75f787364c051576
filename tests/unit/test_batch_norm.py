"""Several workers' batch norm equals one worker's over all their examples."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.spawn import spawn

from fruitray.batch_norm import Synchronised

SHARES = (slice(0, 5), slice(5, 8))
EXAMPLES = 8
CASES = {"affine": (True, False), "not affine": (False, False), "bfloat16": (True, True)}
"""Name -> (whether the layers have weights, whether all is in bfloat16)."""


def network(affine: bool) -> nn.Module:
    torch.manual_seed(0)
    images = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 6, 3)]
    flat = [nn.BatchNorm2d(6, affine=affine), nn.Flatten(), nn.Linear(96, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)]
    return nn.Sequential(*images, *flat)


def train(module: nn.Module, parameters: Any, share: slice, workers: int, halved: bool) -> None:
    """Three steps over far from normal numbers, in bfloat16 where `halved`."""
    torch.manual_seed(1)
    inputs, labels = torch.randn(EXAMPLES, 3, 8, 8) * 3 + 10, torch.arange(EXAMPLES) % 3
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=halved):
            logits = module(inputs[share])
        loss = F.cross_entropy(logits.float(), labels[share], reduction="sum")
        (loss * workers / EXAMPLES).backward()
        optimizer.step()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(SHARES))
    for case, (affine, halved) in CASES.items():
        module = network(affine)
        train(Synchronised(module), module.parameters(), SHARES[rank], len(SHARES), halved)
        torch.save(module.state_dict(), Path(folder, f"{case} {rank}.pt"))
    dist.destroy_process_group()  # its threads may hold tensors: left to the interpreter's end, they can abort it


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each worker has learned in each case."""
    folder = tmp_path_factory.mktemp("learned")
    spawn(work, (str(folder),), nprocs=len(SHARES))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_workers_with_unequal_shares_learn_what_one_learns(learned: Path, case: str) -> None:
    affine, halved = CASES[case]
    alone = network(affine)
    train(alone, alone.parameters(), slice(None), 1, halved)
    tolerance = 0.02 if halved else 1e-5
    first, second = (torch.load(learned / f"{case} {rank}.pt") for rank in range(2))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=tolerance, atol=tolerance)
