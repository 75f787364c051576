"""The page of a run on real photos, every part of it."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fruitray.synthetic import LABELS
from tests.browser import MODEL, PHOTOS, SCORES, TRIALS, opened, require_readable
from tests.cluster import Cluster

BACKBONE, EACH = "timm/tf_efficientnetv2_b0", 24


@pytest.mark.chaos
def test_the_page_of_a_run_on_real_photos(
    tmp_path: Path, cluster: Cluster, shared_data: Path, shared_weights: Path
) -> None:
    raw, index, tune, model, scores = (str(tmp_path / name) for name in ("raw", "index", "tune", "model", "scores"))
    for label in LABELS:
        (tmp_path / "raw" / label).mkdir(parents=True)
        for photo in sorted((shared_data / "vuw-fruit" / label).iterdir())[:EACH]:
            shutil.copy(photo, tmp_path / "raw" / label)
    shutil.copy(photo, tmp_path / "raw" / label / "copy.jpg")
    (tmp_path / "raw" / label / "none.jpg").write_bytes(b"no photo")
    given = ("--weights", str(shared_weights), "--image-size", "96")
    for job, arguments in {
        "prepare": ("--images", raw, "--out", index, "--probe", BACKBONE, *given),
        "tune": ("--index", index, "--out", tune, "--backbones", BACKBONE, "--trials", "2", *given),
        "train": ("--index", index, "--out", model, "--config", f"{tune}/best.json"),
        "score": ("--package", model, "--images", raw, "--out", scores, "--cost-per-hour", "1"),
    }.items():
        code, printed = cluster.run(job, *arguments, page=job == "score")
        assert code == 0, printed
        assert ("see " in printed) == (job == "score")
    file = tmp_path / "scores" / "report.html"
    assert file.stat().st_size < 3_000_000
    require_readable(file, PHOTOS | TRIALS | MODEL | SCORES)
    with opened(file, 1400) as (page, _):
        text = page.locator("main").inner_text().lower()
        for said in ("the same file", "e_not_image", "layers", "drift", "cost_per_1000", "augmentation", "threshold"):
            assert said in text, said
        wrong = pq.read_table(f"{index}/suspects.parquet")["likely_wrong"].to_pylist()
        assert ("labels that look wrong" in text) == any(wrong)
