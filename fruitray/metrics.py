"""Counts that add up across workers and batches, and what follows from them."""

from math import sqrt

import torch


def confusion(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """(C, C) int64 counts of two (N,) int64: rows the true class, columns the predicted. Counts of parts add up."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def accuracy(counts: torch.Tensor) -> float:
    """Share of the diagonal, 0 for no examples."""
    return counts.diagonal().sum().item() / max(1, counts.sum().item())


def wilson_interval(counts: torch.Tensor) -> tuple[float, float]:
    """95% interval of the accuracy (Wilson 1927): honest for small counts and near 1, where the normal one is not."""
    z = 1.96
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


def summary(counts: torch.Tensor) -> dict[str, float | list[float]]:
    """What a table row tells of (C, C) counts: accuracy, its interval, recalls."""
    low, high = wilson_interval(counts)
    return {"accuracy": accuracy(counts), "accuracy_low": low, "accuracy_high": high, "recalls": recalls(counts)}


def distinguishable(first: torch.Tensor, second: torch.Tensor, groups: torch.Tensor) -> float:
    """p-value of two models being equally good, from (N,) bool: whether each was right, on the same photos; those of
    one of the (N,) `groups`, duplicates, count once, for the model that got more of them right.

    McNemar's exact test (1947): of the photos that just one of them got right, either would have half.
    """
    from scipy.stats import binomtest  # on use: it takes half a second to load

    numbers = torch.unique(groups, return_inverse=True)[1]
    ahead = torch.zeros(len(groups), dtype=torch.int64).index_add(0, numbers, first.long() - second.long())
    wins, losses = int((ahead > 0).sum()), int((ahead < 0).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
