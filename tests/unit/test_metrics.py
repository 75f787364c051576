"""Behaviour of the counts and of what follows from them."""

import pytest
import torch
from sklearn import metrics as reference

from fruitray.metrics import accuracy, confusion, distinguishable, recalls, wilson_interval


def scored(examples: int = 200, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, C) that are right more often than not, and labels (N,) among which class 3 never comes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes - 1, (examples,), generator=generator)
    logits = torch.randn(examples, classes, generator=generator)
    logits[torch.arange(examples), labels] += 1
    return logits, labels


def right(hits: int, total: int) -> torch.Tensor:
    """Counts of two classes, `hits` of `total` right."""
    return torch.tensor([[hits, total - hits], [0, 0]])


@pytest.mark.parametrize(  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    ("hits", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_published_one(hits: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(right(hits, total)) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(right(total - hits, total)) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_interval_stays_within_reason() -> None:
    assert wilson_interval(right(10, 10))[1] == 1
    assert wilson_interval(right(0, 10))[0] == 0
    low, high = wilson_interval(right(0, 0))
    assert 0 <= low < high <= 1


def test_counts_of_parts_add_up() -> None:
    logits, labels = scored()
    predicted = logits.argmax(dim=1)
    parts = [confusion(predicted[some], labels[some], 4) for some in torch.arange(len(labels)).tensor_split(7)]
    assert torch.equal(sum(parts), confusion(predicted, labels, 4))


def test_an_empty_part_counts_nothing() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert confusion(nothing, nothing, 3).tolist() == [[0, 0, 0]] * 3


def test_everything_agrees_with_scikit_learn() -> None:
    logits, labels = scored()
    predicted = logits.argmax(dim=1)
    counts = confusion(predicted, labels, 4)
    assert counts.tolist() == reference.confusion_matrix(labels, predicted, labels=range(4)).tolist()
    assert accuracy(counts) == pytest.approx(reference.accuracy_score(labels, predicted))
    settings = {"labels": range(4), "average": None, "zero_division": 0}
    assert recalls(counts) == pytest.approx(reference.recall_score(labels, predicted, **settings))


def test_no_examples_are_no_accuracy() -> None:
    assert accuracy(torch.zeros(3, 3, dtype=torch.int64)) == 0


def trues(*runs: tuple[int, bool]) -> torch.Tensor:
    return torch.cat([torch.full((count,), value) for count, value in runs])


def test_models_are_told_apart_by_the_photos_that_only_one_gets_right() -> None:
    """10 against 2: the two-sided binomial test's 2 * (1 + 12 + 66) / 2^12; photos that both get right say nothing."""
    first = trues((10, True), (2, False), (500, True))
    second = trues((10, False), (2, True), (500, True))
    alone = torch.arange(len(first))
    assert distinguishable(first, second, alone) == pytest.approx(2 * 79 / 4096)
    assert distinguishable(second, first, alone) == distinguishable(first, second, alone)
    assert distinguishable(first, first, alone) == 1
    together = 1000 * torch.tensor([0] * 5 + [1, 2, 3, 4, 5] + [0] * 2 + [6] * 500)
    assert distinguishable(first, second, together) == pytest.approx(2 / 64), "5 alone, and a group where it is 5 to 2"
