"""Counts that add up across workers and batches, and what follows from them."""

from math import sqrt

import torch


def confusion(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(C, C) int64 counts on the CPU, rows the true class, columns the predicted one. Counts of parts add up."""
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(dim=1)
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes).cpu()


def accuracy(counts: torch.Tensor) -> float:
    """Share of the diagonal, 0 for no examples."""
    return counts.diagonal().sum().item() / max(1, counts.sum().item())


def wilson_interval(counts: torch.Tensor, z: float = 1.96) -> tuple[float, float]:
    """95% interval of the accuracy (Wilson 1927): honest for small counts and near 1, where the normal one is not."""
    total = max(1, int(counts.sum().item()))
    share = accuracy(counts)
    centre = share + z * z / (2 * total)
    spread = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def recalls(counts: torch.Tensor) -> list[float]:
    """Per true class, the share that was found; 0 for a class without examples."""
    shares: list[float] = (counts.diagonal() / counts.sum(dim=1).clamp(min=1)).tolist()
    return shares


def precisions(counts: torch.Tensor) -> list[float]:
    """Per predicted class, the share that was right; 0 for a class never predicted."""
    return recalls(counts.T)
