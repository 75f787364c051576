"""The page of a run on real photos, every part of it."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq

from tests.browser import MODEL, PHOTOS, SCORES, TRIALS, opened, require_readable
from tests.cluster import Cluster

BACKBONE, EACH = "timm/tf_efficientnetv2_b0", 24


def test_the_page_of_a_run_on_real_photos(
    tmp_path: Path, cluster: Cluster, shared_data: Path, shared_weights: Path
) -> None:
    raw, runs = tmp_path / "raw", tmp_path / "runs"
    for number, photo in enumerate(sorted((shared_data / "vuw-sample").glob("*/*.jpg"))):
        folder = raw / photo.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        if len(list(folder.iterdir())) < EACH:
            shutil.copyfile(photo, folder / f"{number}.jpg")
    shutil.copyfile(next((raw / "cherry").iterdir()), raw / "cherry" / "copy.jpg")
    (raw / "tomato" / "none.jpg").write_bytes(b"no photo")
    weights, small = ("--weights", str(shared_weights)), ("--image-size", "96")
    for job, arguments in {
        "prepare": ("--images", raw, "--out", runs / "index", "--probe", BACKBONE, *weights, *small),
        "tune": (
            "--index",
            runs / "index",
            "--out",
            runs / "tune",
            "--backbones",
            BACKBONE,
            *weights,
            *small,
            "--trials",
            3,
        ),
        "train": ("--index", runs / "index", "--out", runs / "model", "--config", runs / "tune" / "best.json"),
        "score": ("--package", runs / "model", "--images", raw, "--out", runs / "scores", "--cost-per-hour", 1),
    }.items():
        code, printed = cluster.run(job, *map(str, arguments))
        assert code == 0, printed
        assert "see " in printed
    file = runs / "scores" / "report.html"
    assert file.stat().st_size < 3_000_000
    require_readable(file, PHOTOS | TRIALS | MODEL | SCORES)
    with opened(file, 1400) as (page, _):
        text = page.locator("main").inner_text().lower()
        for said in ("the same file", "e_not_image", "layers", "drift", "cost_per_1000", "augmentation", "threshold"):
            assert said in text, said
        wrong = pq.read_table(runs / "index" / "suspects.parquet")["likely_wrong"].to_pylist()
        assert ("labels that look wrong" in text) == any(wrong)
