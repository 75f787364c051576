"""The page of a run: found by what lies where, whole where parts are missing; wild names are only ever text."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fruitray.commit import commit, finish, read_shards, write_plan
from fruitray.errors import NoInputError
from fruitray.index import read_index, write_index
from fruitray.inputs import INPUTS, uris
from fruitray.report import charts
from fruitray.report.outputs import find_outputs
from fruitray.report.page import FILE, write_report
from fruitray.scores import schema
from fruitray.storage import LocalStorage, open_storage
from fruitray.suspects import SCHEMA as SUSPECTS
from fruitray.suspects import write_suspects
from fruitray.trials import SCHEMA as TRIALS
from fruitray.trials import table as trials_table
from tests.browser import WIDTHS, opened, require_readable
from tests.unit.runs import write_photos_and_index

WILD = "<img src=x>$x_1$ & \"'"
SETTINGS = {"model_id": "0" * 64, "classes": ["cherry", WILD], "engine": "eager", "embeddings": False}
PACKAGE = b'{"classes": ["cherry"]}'


def write_scores(folder: Path, photos: int, *, labels: tuple[str, ...] = ("cherry", WILD)) -> None:
    """A finished output with so many rows, each hundredth an error."""
    out, draws = LocalStorage(str(folder)), np.random.default_rng(0)
    inputs = pa.Table.from_pylist(
        [
            {"root": "s3://b", "key": f"{WILD}/{number}", "label": None, "size": 1, "etag": "v", "kind": "file"}
            for number in range(photos)
        ],
        INPUTS,
    )
    plan = write_plan(out, SETTINGS, inputs, 4096)
    for key, shard in read_shards(out, plan).items():
        rows = [
            {"uri": uri, "etag": "v", "model_id": SETTINGS["model_id"]}
            | (
                {"status": "error", "error_code": "E_EMPTY", "error": WILD}
                if number % 100 == 0
                else {"status": "ok", "label": labels[number % len(labels)], "confidence": draws.random()}
            )
            for number, uri in enumerate(uris(shard).to_pylist())
        ]
        commit(out, plan, key, shard, pa.Table.from_pylist(rows, schema(embeddings=False)))
    finish(out, plan)


def write_trials(folder: Path, count: int) -> None:
    draws = np.random.default_rng(0)
    rows = [
        dict.fromkeys(TRIALS.names)
        | {
            "trial": number,
            "backbone": ("resnet101", "resnet50", WILD)[number % 3],
            "part": "last layer",
            "weights": "imagenet",
            "learning_rate": 1e-3,
            "batch_size": 32,
            "accuracy": float(draws.random()),
            "accuracy_low": 0.1,
            "accuracy_high": 0.9,
            "fold_accuracies": [0.5],
            "recalls": [0.5, 0.6],
            "right": (draws.random(100) < 0.5).tolist(),
            "curve": draws.random(20).tolist(),
            "best_epoch": 7,
            "epochs": 20,
            "seconds": float(draws.random() * 600),
        }
        for number in range(count)
    ]
    rows[-1] |= {"accuracy": None, "error": WILD}
    LocalStorage(str(folder)).write("trials.parquet", _bytes(trials_table(rows)))


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_a_large_run_has_a_small_page(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores", 100_000)
    write_trials(tmp_path / "tune", 200)
    page = write_report([str(tmp_path)])
    assert len(page) < 5_000_000
    assert b"100,000 rows" in page
    assert b"200 trials" in page


def test_names_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores", 300)
    write_trials(tmp_path / "tune", 8)
    page = write_report([str(tmp_path)])
    (tmp_path / FILE).write_bytes(page)
    assert b"<img src=x" not in page
    require_readable(tmp_path / FILE, {"time against accuracy", "rows by label"})
    with opened(tmp_path / FILE, WIDTHS[0]) as (shown, said):
        assert WILD in shown.locator("table").first.inner_text()
        assert WILD in str(shown.locator("svg").first.text_content())
        assert shown.locator("script").count() == 1
        assert said == []


def test_what_was_made_from_what_is_followed(tmp_path: Path) -> None:
    index = write_photos_and_index(tmp_path)
    write_trials(tmp_path / "tune", 2)
    for place, name, options in (
        ("tune", "tune", {"index": index}),
        ("model", "train", {"index": f"{index}/index.parquet", "config": f"{tmp_path}/tune/best.json"}),
        ("scores", "score", {"package": f"{tmp_path}/model"}),
    ):
        open_storage(f"{tmp_path}/{place}").write(f"{name}.json", json.dumps(options).encode())
    open_storage(f"{tmp_path}/model").write("package.json", b'{"classes": []}')
    write_scores(tmp_path / "scores", 10)
    outputs = find_outputs([f"{tmp_path}/scores"])
    places = {"prepare": index, "tune": f"{tmp_path}/tune", "train": f"{tmp_path}/model", "score": f"{tmp_path}/scores"}
    assert {job: output.storage.uri for job, output in outputs.items()} == places


def test_provenance_wins_over_what_lies_beside(tmp_path: Path) -> None:
    for name in ("a-package", "b-model"):
        open_storage(f"{tmp_path}/{name}").write("package.json", json.dumps({"classes": [name]}).encode())
    open_storage(f"{tmp_path}/0-web").write("package.json", b'{"name": "another\'s"}')
    assert find_outputs([str(tmp_path)])["train"].storage.uri == f"{tmp_path}/a-package", "the first that is one"
    write_scores(tmp_path / "scores", 10)
    open_storage(f"{tmp_path}/scores").write("score.json", json.dumps({"package": f"{tmp_path}/b-model"}).encode())
    assert find_outputs([str(tmp_path)])["train"].storage.uri == f"{tmp_path}/b-model"


def test_of_many_labels_the_errors_are_still_shown(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores", 2000, labels=tuple(f"label {number}" for number in range(500)))
    page = write_report([str(tmp_path)]).decode()
    assert "E_EMPTY" in page
    assert "60 of 496 are shown" in page
    assert "the 30 commonest" in page


def test_rows_that_are_all_errors_are_no_drift(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores", 1)
    page = write_report([str(tmp_path)]).decode()
    assert "1 of them are errors" in page
    assert "would have to change" not in page


def test_a_part_that_is_damaged_costs_its_own_section_alone(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores", 10)
    write_trials(tmp_path / "tune", 3)
    (tmp_path / "scores" / "manifest.json").write_text("{")
    page = write_report([str(tmp_path)]).decode()
    assert "is no manifest of this program" in page
    assert "3 trials" in page


def test_a_package_of_anybody_costs_its_own_section_alone(tmp_path: Path) -> None:
    write_trials(tmp_path / "tune", 3)
    for package, options in ((b"[1]", b"{}"), (b"no JSON", b"[1]"), (b'{"classes": null, "model": 3}', b"[1]")):
        open_storage(f"{tmp_path}/model").write("package.json", package)
        open_storage(f"{tmp_path}/model").write("train.json", options)
        page = write_report([str(tmp_path)]).decode()
        assert ("This part could not be read" in page) == (b"model" in package)
        assert "3 trials" in page


def test_photos_that_are_gone_leave_a_page_without_them(tmp_path: Path) -> None:
    index = write_photos_and_index(tmp_path)
    assert b"data:image/jpeg" in write_report([index])
    for photo in (tmp_path / "photos").rglob("*.png"):
        photo.unlink()
    page = write_report([index])
    assert b"data:image/jpeg" not in page
    assert b"not to be had" in page


def test_labels_that_look_wrong_are_shown_and_others_not(tmp_path: Path) -> None:
    index = write_photos_and_index(tmp_path)
    uris = read_index(index).table["uri"].to_pylist()
    current = read_index(index).sha256
    for wrong, probed in (({}, current), ({"likely_wrong": True}, current), ({"likely_wrong": True}, "an earlier one")):
        doubt = {"label_confidence": 0.04, "suggested": "tomato", "suggested_confidence": 0.96, "likely_wrong": False}
        rows = [{"rank": number, "uri": uri, "label": "cherry", **doubt} for number, uri in enumerate(uris, 1)]
        rows[0] |= wrong
        write_suspects(open_storage(index), pa.Table.from_pylist(rows, SUSPECTS), {"index": probed})
        page = write_report([index]).decode()
        shown = wrong != {} and probed == current
        assert ("labels that look wrong" in page) == shown
        assert page.count("rather tomato (96%)") == shown


def test_what_was_made_from_another_index_or_model_says_so(tmp_path: Path) -> None:
    index = write_photos_and_index(tmp_path)
    write_trials(tmp_path / "tune", 2)
    write_scores(tmp_path / "scores", 10)
    package = open_storage(f"{tmp_path}/model")
    for known, plan, said in (
        (read_index(index).sha256, SETTINGS["model_id"], [False, True]),
        ("an earlier one", hashlib.sha256(PACKAGE).hexdigest(), [True, False]),
    ):
        options = json.dumps({"index": index, "index_sha256": known})
        open_storage(f"{tmp_path}/tune").write("tune.json", options.encode())
        package.write("package.json", PACKAGE)
        planned = tmp_path / "scores" / "_fruitray" / "plan.json"
        planned.write_text(planned.read_text().replace(str(SETTINGS["model_id"]), plan))
        page = write_report([f"{tmp_path}/tune", f"{tmp_path}/scores", f"{tmp_path}/model", index]).decode()
        found = [words in page for words in ("made from another index", "of another model than this page shows")]
        assert found == said


def test_of_more_groups_than_are_listed_those_across_classes_come_first(tmp_path: Path) -> None:
    index = write_photos_and_index(tmp_path)
    rows = [
        {
            "uri": f"/p/{label}/{group}-{number}.png",
            "label": label,
            "status": "ok",
            "group": f"{group:016x}",
            "sha256": f"{group}-{number}",
            "excluded": "duplicate",
        }
        for group in range(1_100)
        for number, label in enumerate(("cherry", "tomato") if group == 7 else ("cherry",) * 3)
    ]
    table = read_index(index).table
    write_index(open_storage(index), pa.concat_tables([table, pa.Table.from_pylist(rows, table.schema)]), "/p")
    page = write_report([index]).decode()
    assert "in several classes" in page
    assert "1,112 more groups stand in the index" in page


def test_classes_that_have_no_room_or_no_name_are_said(tmp_path: Path) -> None:
    index = write_photos_and_index(tmp_path)
    row = {"status": "ok", "split": "train", "width": 8, "height": 8}
    rows = [{"uri": f"/p/{number}/1.png", "label": f"{number}", **row} for number in range(40)]
    rows.append({"uri": "/p/1.png", "status": "ok", "excluded": "no_label", "width": 8, "height": 8})
    write_index(open_storage(index), pa.Table.from_pylist(rows, read_index(index).table.schema), "/p")
    page = write_report([index]).decode()
    assert "photos by class and split, the first 30 classes by name" in page
    assert '<button type="button">(none)</button>' in page
    assert '<button type="button"></button>' not in page


def height_of(chart: str) -> float:
    found = re.search(r'viewBox="0 0 \S+ (\S+)"', chart)
    assert found
    return float(found[1])


def test_a_legend_of_long_names_stands_below_and_they_differ() -> None:
    names = [f"timm/vit_small_patch16_224.{data} (last layer)" for data in ("augreg_in1k", "augreg_in21k")]
    drawn = charts.scatter({name: ([1.0], [0.5]) for name in names}, x="minutes", y="accuracy", says="points")
    assert all(name in drawn for name in names)
    alone = charts.scatter({"a": ([1.0], [0.5])}, x="minutes", y="accuracy", says="a point")
    assert height_of(drawn) > height_of(alone)


def test_a_place_that_no_job_has_written_to_is_said(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="holds nothing that a job wrote"):
        write_report([str(tmp_path)])
