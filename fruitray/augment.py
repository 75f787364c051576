"""Changes to training photos, a batch at a time."""

import torch

VARIANTS = {"none": ("original",), "mirror": ("original", "mirrored")}
"""For each policy the fixed variants of a photo, where they are computed once and kept (`features.py`)."""


def variant(batch: torch.Tensor, name: str) -> torch.Tensor:
    """`batch` (B, 3, S, S) as the variant `name`."""
    return batch.flip(3) if name == "mirrored" else batch


def augment(batch: torch.Tensor, policy: str, draws: torch.Tensor) -> torch.Tensor:
    """`batch` (B, 3, S, S), each photo as the variant of `policy` that its draw picks; `draws` (B,) lie in [0, 1)."""
    picked = (draws * len(VARIANTS[policy])).long()
    for number, name in enumerate(VARIANTS[policy]):
        batch = torch.where((picked == number)[:, None, None, None], variant(batch, name), batch)
    return batch
