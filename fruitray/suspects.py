"""Labels that are probably wrong: where a linear probe on frozen embeddings disagrees with a label it has not seen.

    embeddings, labels, groups -> out-of-fold probabilities -> ranked suspects -> suspects.parquet

scikit-learn trains the probe and cleanlab says how many labels are wrong (confident learning). What is left to do here,
because neither does it, is to keep copies in one fold, to pick the probe's penalty without a clean set, and the table.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fruitray.errors import UsageError
from fruitray.storage import Storage
from fruitray.tables import field, parquet

FILE = "suspects.parquet"

PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Weights of the squared norm beside the mean loss, strongest first. A probe that is held too loosely learns the wrong
labels by heart and vouches for their like."""

FOLDS = 5
"""Parts of the rows that take turns to be judged; fewer where there are fewer groups."""
REPEATS = 3
"""Divisions into folds that probabilities are averaged over, so that no single draw decides a rank."""

_Fold = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Row numbers that the probe learns from, and those that it judges."""

SCHEMA = pa.schema(
    column.with_nullable(False)
    for column in [
        field("rank", pa.int32(), "1 is the most suspect; by label_confidence"),
        field("uri", pa.string(), "the photo"),
        field("label", pa.string(), "the class it is filed under"),
        field("suggested", pa.string(), "the class the probe finds most probable; the label where it agrees"),
        field("label_confidence", pa.float32(), "probability of `label`, from probes that never saw this photo"),
        field("suggested_confidence", pa.float32(), "probability of `suggested`, from the same probes"),
        field("likely_wrong", pa.bool_(), "confident learning counts this label among the wrong ones"),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspects:
    """What the probe thinks of each row, in the order of the rows."""

    rank: NDArray[np.int32]
    """(N,) 1 is the most suspect."""
    suggested: NDArray[Any]
    """(N,) the most probable class, as the labels name it; the label itself where the probe agrees."""
    label_confidence: NDArray[np.float32]
    """(N,) out-of-fold probability of the label."""
    suggested_confidence: NDArray[np.float32]
    """(N,) out-of-fold probability of the suggested class."""
    likely_wrong: NDArray[np.bool_]
    """(N,) whether confident learning takes the label for wrong."""


def rank_suspects(
    embeddings: NDArray[np.float32], labels: NDArray[Any], groups: NDArray[Any], *, seed: int = 0
) -> Suspects:
    """Rank rows by how little an out-of-fold probe believes their label, and estimate which labels are wrong.

    The rank is by self-confidence, the estimate by confident learning (Northcutt, Jiang and Chuang, "Confident
    Learning: Estimating Uncertainty in Dataset Labels", JAIR 70, 2021). Rows of one group never judge each other, so
    that a copy cannot vouch for its twin. With groups named by content (SHA-256) the folds depend on content and seed
    alone; the order of the rows then changes the result by rounding only.

    Args:
        embeddings: (N, D) float32 of a frozen trunk.
        labels: (N,) names or numbers of classes.
        groups: (N,) integers or strings; rows with copies or near-copies of one photo share one.
        seed: draws the folds.

    Raises:
        UsageError: fewer than two classes, a class whose rows lie in one group, or embeddings that are not finite.
    """
    assert len(embeddings) == len(labels) == len(groups)
    classes, dense = np.unique(labels, return_inverse=True)  # (C,), and (N,) numbers in it
    groups = np.unique(groups, return_inverse=True)[1]
    _require_enough(classes, dense, groups)
    probabilities = _out_of_fold(_standardised(embeddings), dense, groups, seed)
    best = probabilities.argmax(axis=1)
    everyone = np.arange(len(dense))
    own = probabilities[everyone, dense]
    rank = np.empty(len(dense), np.int32)
    rank[np.lexsort((groups, own))] = everyone + 1
    return Suspects(
        rank=rank,
        suggested=classes[best],
        label_confidence=own.astype(np.float32),
        suggested_confidence=probabilities[everyone, best].astype(np.float32),
        likely_wrong=_likely_wrong(dense, probabilities),
    )


def suspects_table(suspects: Suspects, uris: Sequence[str], labels: Sequence[str]) -> pa.Table:
    """One row of `SCHEMA` per photo, most suspect first; `uris` and the classes' names in the order that was ranked."""
    columns = {
        "rank": suspects.rank,
        "uri": uris,
        "label": labels,
        "suggested": suspects.suggested.tolist(),
        "label_confidence": suspects.label_confidence,
        "suggested_confidence": suspects.suggested_confidence,
        "likely_wrong": suspects.likely_wrong,
    }
    return pa.table(columns, SCHEMA).sort_by("rank")


def write_suspects(storage: Storage, table: pa.Table, facts: Mapping[str, Any]) -> None:
    """Write `suspects.parquet` into `storage`; `facts` (which index, which trunk) go into its metadata as JSON.

    The same table and facts give the same bytes.
    """
    metadata = {"fruitray": json.dumps(facts, sort_keys=True)}
    storage.write(FILE, parquet(table.cast(SCHEMA).replace_schema_metadata(metadata)))


def _require_enough(classes: NDArray[Any], dense: NDArray[np.int64], groups: NDArray[np.int64]) -> None:
    """Each class must be known without any one of its groups."""
    counts = _group_counts(dense, groups)
    found = ", ".join(f"{name}: {count}" for name, count in zip(classes, counts, strict=True))
    if len(classes) < 2:
        raise UsageError(f"suspects need at least two classes; different photos in each: {found or 'none'}")
    if min(counts) < 2:
        raise UsageError(f"suspects need two different photos of every class; found {found}")


def _group_counts(dense: NDArray[np.int64], groups: NDArray[np.int64]) -> list[int]:
    """How many groups each class has members in."""
    return [len(np.unique(groups[dense == number])) for number in np.unique(dense)]


def _standardised(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each feature with mean 0 and variance 1 over all rows, which takes no label to do; constant ones become 0."""
    from sklearn.preprocessing import StandardScaler  # on use, as below: scikit-learn is slow to load

    if not np.isfinite(embeddings).all():
        bad = int((~np.isfinite(embeddings)).any(axis=1).sum())
        raise UsageError(f"{bad} of {len(embeddings)} embeddings hold numbers that are not finite")
    standardised: NDArray[np.float32] = StandardScaler().fit_transform(embeddings)
    return standardised


def _out_of_fold(
    features: NDArray[np.float32], dense: NDArray[np.int64], groups: NDArray[np.int64], seed: int
) -> NDArray[np.float64]:
    """(N, C) probabilities, each row's from probes that saw nothing of its group.

    The penalty is the one whose probabilities fit the given labels best out of fold.
    """
    draws = np.random.RandomState(seed % 2**32)  # the only kind that scikit-learn takes
    first, *others = (_divide(dense, groups, draws) for _ in range(REPEATS))
    penalty, probabilities = _best_penalty(_judgements(features, dense, first, PENALTIES), dense)
    for division in others:
        probabilities = probabilities + next(_judgements(features, dense, division, (penalty,)))
    return probabilities / REPEATS


def _divide(dense: NDArray[np.int64], groups: NDArray[np.int64], draws: np.random.RandomState) -> list[_Fold]:
    """At most `FOLDS` folds, stratified and with groups whole, so that each leaves every class to learn from.

    A class with fewer groups than folds is missing from what some folds judge, never from what they learn.

    Raises:
        UsageError: there is no such division.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    most = min(FOLDS, len(np.unique(groups)), np.bincount(dense).max())
    for count in range(most, 1, -1):
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=draws)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of classes smaller than `count`
            division = [fold for fold in splitter.split(dense, dense, groups) if len(fold[1])]
        if all(len(np.unique(dense[learned])) == dense.max() + 1 for learned, _ in division):
            return division
    raise UsageError("suspects need folds that leave every class to learn from; copies tie the classes together")


def _judgements(
    features: NDArray[np.float32], dense: NDArray[np.int64], division: list[_Fold], penalties: Sequence[float]
) -> Iterator[NDArray[np.float64]]:
    """(N, C) out-of-fold probabilities for each penalty in turn; each probe starts from the one before it."""
    from sklearn.linear_model import LogisticRegression

    probes = [LogisticRegression(tol=1e-3, max_iter=200, warm_start=True) for _ in division]
    for penalty in penalties:
        probabilities = np.empty((len(dense), dense.max() + 1))
        for probe, (learned, judged) in zip(probes, division, strict=True):
            probe.set_params(C=1 / (penalty * len(learned))).fit(features[learned], dense[learned])
            probabilities[judged] = probe.predict_proba(features[judged])
        yield probabilities


def _best_penalty(
    judgements: Iterator[NDArray[np.float64]], dense: NDArray[np.int64]
) -> tuple[float, NDArray[np.float64]]:
    """The penalty, and its probabilities, after which the log loss first rises."""
    best = (np.inf, PENALTIES[0], np.empty(0))
    for penalty, probabilities in zip(PENALTIES, judgements, strict=True):
        own = probabilities[np.arange(len(dense)), dense]
        loss = -np.log(np.maximum(own, 1e-7)).mean()  # no smaller: float32 knows nothing closer to 1 on the other side
        if loss >= best[0]:
            break
        best = (loss, penalty, probabilities)
    return best[1:]


def _likely_wrong(dense: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(N,) the labels that confident learning would prune."""
    from cleanlab.filter import find_label_issues

    found: NDArray[np.bool_] = find_label_issues(dense, probabilities, n_jobs=1)  # more processes cost more than it
    return found
