"""Behaviour of the suspected label errors: flipped labels come first, copies do not vouch, odd sets do no harm."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from fruitray.errors import UsageError
from fruitray.storage import LocalStorage
from fruitray.suspects import FILE, SCHEMA, Suspects, rank_suspects, suspects_table, write_suspects

CLASSES = 3
FLIPPED = np.array([5, 17, 40, 101, 150, 203, 222, 290])


def blobs(per_class: int = 100, dimensions: int = 16, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(N, D) embeddings in one cloud per class, which overlap a little, and their (N,) true classes."""
    random = np.random.default_rng(seed)
    truth = np.repeat(np.arange(CLASSES), per_class)
    centres = 5 * np.eye(CLASSES, dimensions)[truth]
    return (centres + random.standard_normal((len(truth), dimensions))).astype(np.float32), truth


def flip(truth: NDArray[np.int64], rows: NDArray[np.int64] = FLIPPED) -> NDArray[np.int64]:
    labels = truth.copy()
    labels[rows] = (labels[rows] + 1) % CLASSES
    return labels


def contents(count: int) -> NDArray[Any]:
    """A name of its own for each row, as SHA-256 gives."""
    return np.array([f"sha-{(7919 * row) % 100_003:06}" for row in range(count)])


def check_sound(found: Suspects, count: int) -> None:
    assert sorted(found.rank) == list(range(1, count + 1))
    for confidence in (found.label_confidence, found.suggested_confidence):
        assert np.isfinite(confidence).all()
        assert ((confidence >= 0) & (confidence <= 1)).all()
    assert (found.suggested_confidence >= found.label_confidence).all()
    assert (np.diff(found.label_confidence[np.argsort(found.rank)]) >= 0).all()


def test_flipped_labels_come_first_with_their_true_class() -> None:
    embeddings, truth = blobs()
    found = rank_suspects(embeddings, flip(truth), contents(300))
    check_sound(found, 300)
    assert found.rank[FLIPPED].max() <= len(FLIPPED) + 2
    assert (found.suggested[FLIPPED] == truth[FLIPPED]).all()
    assert found.likely_wrong[FLIPPED].mean() >= 0.9
    assert found.likely_wrong.sum() <= len(FLIPPED) + 3


def test_a_clean_set_has_hardly_a_likely_error() -> None:
    embeddings, truth = blobs()
    assert rank_suspects(embeddings, truth, contents(300)).likely_wrong.sum() <= 3


def test_one_flipped_label_in_ten_is_found_as_well() -> None:
    embeddings, truth = blobs()
    rows = np.arange(0, 300, 10)
    found = rank_suspects(embeddings, flip(truth, rows), contents(300))
    assert (found.rank[rows] <= len(rows) + 2).mean() >= 0.9


def test_a_mislabelled_copy_does_not_vouch_for_its_twin() -> None:
    """Two copies of a photo unlike any other, filed in the wrong class both: who has seen one knows the other."""
    embeddings, truth = blobs()
    signature = np.zeros((300, 1), np.float32)
    twins = np.array([50, 51])
    signature[twins], embeddings[51] = 5, embeddings[50]
    embeddings, labels = np.hstack([embeddings, signature]), flip(truth, twins)
    apart = contents(300)
    together = apart.copy()
    together[51] = together[50]
    judged_together = rank_suspects(embeddings, labels, together)
    judged_apart = rank_suspects(embeddings, labels, apart)
    assert sorted(judged_together.rank[twins]) == [1, 2]
    assert judged_together.label_confidence[twins].max() < 0.1
    assert judged_apart.label_confidence[twins].min() > 3 * judged_together.label_confidence[twins].max()


def test_of_two_copies_in_two_classes_the_wrong_one_is_suspect() -> None:
    embeddings, truth = blobs()
    embeddings[51] = embeddings[50]
    groups = contents(300)
    groups[51] = groups[50]
    found = rank_suspects(embeddings, flip(truth, np.array([51])), groups)
    assert found.rank[51] == 1
    assert not found.likely_wrong[50]
    assert found.suggested[51] == truth[51]


def test_the_same_call_gives_the_same_bits_and_another_seed_other_folds() -> None:
    embeddings, truth = blobs()
    first, second, other = (rank_suspects(embeddings, flip(truth), contents(300), seed=seed) for seed in (7, 7, 8))
    for name in Suspects.__slots__:
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert not np.array_equal(first.label_confidence, other.label_confidence)


def test_the_order_of_the_rows_does_not_matter() -> None:
    embeddings, truth = blobs()
    labels, groups = flip(truth), contents(300)
    order = np.random.default_rng(1).permutation(300)
    straight = rank_suspects(embeddings, labels, groups)
    shuffled = rank_suspects(embeddings[order], labels[order], groups[order])
    np.testing.assert_allclose(shuffled.label_confidence, straight.label_confidence[order], atol=1e-3)
    assert np.array_equal(shuffled.likely_wrong, straight.likely_wrong[order])
    assert np.array_equal(shuffled.suggested, straight.suggested[order])


@pytest.mark.parametrize("classes", [(2, 5, 11), ("cherry", "strawberry", "tomato")])
def test_classes_may_have_any_names(classes: tuple[Any, ...]) -> None:
    embeddings, truth = blobs()
    names = np.array(classes)
    numbered = rank_suspects(embeddings, flip(truth), contents(300))
    named = rank_suspects(embeddings, names[flip(truth)], contents(300))
    assert np.array_equal(named.rank, numbered.rank)
    assert np.array_equal(named.suggested, names[numbered.suggested])


@pytest.mark.parametrize("few", [2, 3, 4])
def test_a_class_may_have_fewer_photos_than_there_are_folds(few: int) -> None:
    embeddings, truth = blobs()
    kept = np.flatnonzero((truth < 2) | (np.arange(300) < 200 + few))
    found = rank_suspects(embeddings[kept], flip(truth)[kept], contents(300)[kept])
    check_sound(found, len(kept))
    flipped = FLIPPED[FLIPPED < 200]
    assert found.rank[flipped].max() <= len(flipped) + few + 2


def test_two_photos_of_two_classes_are_enough_to_run() -> None:
    embeddings, truth = blobs(2)
    check_sound(rank_suspects(embeddings[:4], truth[:4], contents(4)), 4)


def test_a_huge_group_of_copies_hides_no_flipped_label() -> None:
    embeddings, truth = blobs()
    embeddings[:60], groups = embeddings[0], contents(300)
    groups[:60] = groups[0]
    flipped = FLIPPED[FLIPPED >= 60]
    found = rank_suspects(embeddings, flip(truth, flipped), groups)
    check_sound(found, 300)
    assert found.rank[flipped].max() <= len(flipped) + 2


def test_more_dimensions_than_photos_and_features_that_never_change() -> None:
    embeddings, truth = blobs(20, dimensions=400)
    embeddings[:, 50:100], embeddings[:, 100:150] = 3.25, 0
    embeddings[:, 150:] += np.random.default_rng(1).standard_normal((CLASSES, 250))[truth]
    found = rank_suspects(embeddings, truth, contents(60))
    check_sound(found, 60)
    assert (found.suggested == truth).mean() > 0.8


def test_embeddings_that_say_nothing_accuse_nobody() -> None:
    truth = blobs()[1]
    found = rank_suspects(np.ones((300, 4), np.float32), truth, contents(300))
    check_sound(found, 300)
    np.testing.assert_allclose(found.label_confidence, 1 / 3, atol=0.05)


def test_a_class_known_from_one_photo_only_is_refused_with_the_counts() -> None:
    embeddings, truth = blobs(10)
    groups = contents(30)
    groups[20:] = groups[20]
    with pytest.raises(UsageError, match="found pear: 10, plum: 10, quince: 1"):
        rank_suspects(embeddings, np.array(["pear", "plum", "quince"])[truth], groups)


@pytest.mark.parametrize(("count", "said"), [(0, "none"), (10, "0: 10")])
def test_a_single_class_is_refused(count: int, said: str) -> None:
    embeddings, truth = blobs(10)
    with pytest.raises(UsageError, match=f"two classes.*{said}$"):
        rank_suspects(embeddings[:count], truth[:count], contents(count))


def test_classes_that_copies_tie_together_are_refused() -> None:
    """Three groups, each in two of the three classes: of any two folds, one leaves a class unknown."""
    labels, groups = np.array([0, 0, 1, 1, 2, 2]), np.array(["a", "b", "b", "c", "c", "a"])
    embeddings = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    with pytest.raises(UsageError, match="copies"):
        rank_suspects(embeddings, labels, groups)


def test_embeddings_that_are_no_numbers_are_refused() -> None:
    embeddings, truth = blobs()
    embeddings[3, 2], embeddings[9, 1] = np.nan, np.inf
    with pytest.raises(UsageError, match="2 of 300"):
        rank_suspects(embeddings, truth, contents(300))


def table_of(embeddings: NDArray[np.float32], labels: NDArray[Any]) -> pa.Table:
    uris = [f"/photos/{row:03}.jpg" for row in range(len(labels))]
    return suspects_table(rank_suspects(embeddings, labels, contents(len(labels))), uris, labels.tolist())


def test_the_file_is_sorted_by_rank_and_describes_its_columns(tmp_path: Path) -> None:
    embeddings, truth = blobs()
    names = np.array(["cherry", "strawberry", "tomato"])
    labels = names[flip(truth)]
    storage = LocalStorage(str(tmp_path))
    write_suspects(storage, table_of(embeddings, labels), {"index": "abc"})
    table = pq.read_table(pa.BufferReader(storage.read(FILE)))
    assert table.schema.names == SCHEMA.names
    assert all(field.metadata[b"description"] for field in table.schema)
    assert json.loads(table.schema.metadata[b"fruitray"]) == {"index": "abc"}
    rows = table.to_pylist()
    assert [row["rank"] for row in rows] == list(range(1, 301))
    assert {row["uri"] for row in rows[: len(FLIPPED) + 2]} >= {f"/photos/{row:03}.jpg" for row in FLIPPED}
    said = {row["uri"]: (row["label"], row["suggested"]) for row in rows}
    assert [said[f"/photos/{row:03}.jpg"] for row in FLIPPED] == [(labels[row], names[truth[row]]) for row in FLIPPED]


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    embeddings, truth = blobs()
    written = []
    for name in ("a", "b"):
        storage = LocalStorage(str(tmp_path / name))
        write_suspects(
            storage, table_of(embeddings, np.array(list("abc"))[flip(truth)]), {"index": "abc", "trunk": "x"}
        )
        written.append(storage.read(FILE))
    assert written[0] == written[1]


def test_importing_it_loads_neither_ray_nor_scikit_learn() -> None:
    code = "import sys, fruitray.suspects; print({'ray', 'sklearn', 'cleanlab'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
