"""What is said about the trials of a search."""

from typing import Any

import pytest
import torch

from fruitray.trials import SCHEMA, pack, rank, show_sweeps, show_trials, table, unpack, verdict


def row(number: int, right: list[bool] | None, **changes: Any) -> dict[str, Any]:
    """A trial that got these photos right; none: it failed before its first epoch ended."""
    blank = dict.fromkeys(SCHEMA.names)
    known = {"trial": number, "axis": "", "backbone": "cnn", "part": "whole network", "epochs": 0, "weights": "none"}
    if right is not None:
        share = sum(right) / len(right)
        measured = {"accuracy": share, "accuracy_low": share, "accuracy_high": share, "recalls": [share]}
        known |= {**measured, "right": right, "epochs": 3, "best_epoch": 2, "seconds": 60.0, "images_per_s": 9.0}
        known |= {"parameters": 30, "trained_parameters": 20, "fold_accuracies": [share]}
    return {**blank, **known, **changes}


def test_the_best_comes_first_and_what_failed_last() -> None:
    failed = row(0, [True] * 4, error="out of memory")
    rows = [failed, row(1, [True, False]), row(2, None, error="no weights"), row(3, [True, True]), row(4, [True, True])]
    assert [one["trial"] for one in sorted(rows, key=rank)] == [3, 4, 1, 0, 2]


@pytest.mark.parametrize(("wins", "told"), [(3, "is not distinguishable"), (30, "is distinguishable")])
def test_the_winner_is_named_with_whether_it_can_be_told_from_the_next(wins: int, told: str) -> None:
    first, second = row(0, [True] * 100), row(1, [False] * wins + [True] * (100 - wins), backbone="vgg16")
    said = verdict([first, second, row(2, None, error="no weights")])
    assert told in said
    assert f"{wins} only by the first, 0 only by the second" in said
    assert "trial 0, cnn (whole network)" in said
    assert "trial 1, vgg16" in said


def test_a_winner_without_a_runner_up_is_named_as_such() -> None:
    assert "no other" in verdict([row(0, [True, False]), row(1, None, error="no weights")])


def test_truths_survive_their_packing() -> None:
    right = torch.rand(897, generator=torch.Generator().manual_seed(0)) < 0.9
    assert unpack(pack(right), 897) == right.tolist()


def test_rows_become_the_documented_table() -> None:
    found = table([row(0, [True]), row(1, None, error="no weights")])
    assert found.schema.equals(SCHEMA)
    assert all(field.metadata[b"description"] for field in found.schema)


def test_of_many_classes_a_screen_shows_the_range_of_recalls_and_all_other_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few, many = [0.25, 0.5, 1.0], [place / 100 for place in range(100)]
    for recalls, shown in ((few, "0.25 0.50 1.00"), (many, "0.00 to 0.99")):
        show_trials([row(0, [True], recalls=recalls, learning_rate=1e-3, batch_size=64)])
        printed = capsys.readouterr().out
        assert shown in printed
        assert "start" in printed
        assert "not shown" not in printed


def test_tables_show_trials_that_failed_too(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(0, [True]), row(1, [True], axis="batch size"), row(2, None, axis="network", error="no weights")]
    rows.append(row(3, [True], epochs=15, fold_accuracies=[1.0] * 5))
    show_trials(rows)
    show_sweeps(rows, epochs=3)
    printed = capsys.readouterr().out
    assert "trial 2 failed: no weights" in printed
    assert "2 of 3" in printed
    assert "15 in 5 folds" in printed
    assert "batch size, up to epoch 3 each" in printed
    assert "network, up to epoch 3 each" in printed
