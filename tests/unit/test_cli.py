"""The command line: help without heavy imports, arguments to configs, errors to exit codes."""

import ast
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from fruitray import config, console, status
from fruitray.cli import JOBS, SHELLS, main, parse, run_job
from fruitray.config import RECIPES, ModelConfig, PrepareConfig, ScoreConfig, resolved, to_json
from fruitray.errors import UsageError
from fruitray.search import draw_trials
from fruitray.storage import LocalStorage
from tests.unit.runs import write_photos_and_index

HEAVY = {"boto3", "pyarrow", "ray", "torch", "torch._dynamo", "torchvision", "torchvision.models"}


def _imported_by(code: str) -> set[str]:
    """Which heavy modules a fresh Python has loaded after `code`."""
    ending = "import sys; print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{ending}"], capture_output=True, text=True, check=True)
    return HEAVY & set(done.stdout.rpartition("loaded:")[2].split())


def test_importing_fruitray_loads_nothing_heavy() -> None:
    assert _imported_by("import fruitray") == set()


@pytest.mark.parametrize("job", JOBS)
def test_help_answers_without_loading_anything_heavy(job: str) -> None:
    tried = f"try: run_job({job!r}, ['--help'])\nexcept SystemExit as end: assert not end.code"
    code = f"from fruitray.cli import run_job\n{tried}"
    assert _imported_by(code) == set()


def test_jobs_load_neither_the_compiler_nor_torchvision_before_they_use_them() -> None:
    code = "import fruitray.cluster.score, fruitray.cluster.train, fruitray.cluster.tune"
    assert not {"torch._dynamo", "torchvision"} & _imported_by(code)


@pytest.mark.parametrize("arguments", [["train", "--help"], ["--help"], ["completion", "zsh"]])
def test_who_reads_only_the_start_of_help_sees_no_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from fruitray.cli import main; main({arguments})"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_option_is_explained() -> None:
    for kind in ast.walk(ast.parse(Path(config.__file__).read_text())):
        for field, after in pairwise([*kind.body, None] if isinstance(kind, ast.ClassDef) else []):
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) not in ("model", "fit"):
                explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert explained, f"{kind.name}.{ast.unparse(field.target)}"


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_its_script_and_its_room(job: str) -> None:
    root = Path(__file__).parents[2]
    assert f'run_job("{job}")' in (root / "jobs" / f"{job}.py").read_text()
    assert (root / "fruitray" / "cluster" / f"{job}.py").exists()


def test_the_command_lists_the_jobs_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert not ended.value.code
    listed = capsys.readouterr().out
    assert all(job in listed for job in JOBS)
    with pytest.raises(SystemExit) as ended:
        main(["predict"])
    assert ended.value.code == 2
    assert "no job 'predict'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["scor"])
    assert ended.value.code == 2
    assert "did you mean score?" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_can_complete_jobs_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert not ended.value.code
    script = capsys.readouterr().out
    assert all(word in script for word in (*JOBS, "--retry-errors", "--near-duplicates"))


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "nosh"])
    assert ended.value.code == 2
    assert "bash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "options.yaml",
            "top_k: 5\nembeddings: true\nimages: [a, b]\nout: there\nmax_error_rate: 0.5\nprevious: null\n",
        ),
        ("score.json", '{"top_k": 5, "embeddings": true, "images": ["a", "b"], "out": "there", "max_error_rate": 0.5}'),
    ],
)
def test_options_come_from_a_file_and_those_given_win(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    parsed = parse("score", ["--config", str(tmp_path / name), "--package", "p", "--out", "here", "--no-embeddings"])
    assert (parsed.top_k, parsed.images, parsed.max_error_rate, parsed.previous) == (5, ("a", "b"), 0.5, None)
    assert (parsed.out, parsed.embeddings, parsed.package) == ("here", False, "p")


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("prepare", ""),
        ("tune", ""),
        ("tune", "--preset full --dropouts"),
        ("tune", "--preset report --hidden None --learning-rates"),
        ("train", ""),
        ("score", ""),
    ],
)
def test_what_a_job_keeps_of_its_options_starts_another_alike(job: str, options: str, tmp_path: Path) -> None:
    required = {"prepare": ("images",), "tune": ("index",), "train": ("index",), "score": ("package", "images")}[job]
    places = [word for name in (*required, "out") for word in (f"--{name}", "x")]
    first = parse(job, [*places, "--no-report", *options.split()])
    kept = json.loads(to_json(first)) | {"index_sha256": "0"}
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    again = parse(job, ["--config", str(tmp_path / "kept.json")])
    assert replace(again, config=None) == first


@pytest.mark.parametrize("text", ["- a\n- list", "[", "\0", "", "null"])
def test_a_file_that_holds_no_options_is_said(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "options.yaml").write_text(text)
    assert run_job("prepare", ["--config", str(tmp_path / "options.yaml")]) == 2
    assert "options.yaml: holds no options" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"fit": {"foo": 1}}', "workers: true", "epochs: 1e1"])
def test_what_is_wrong_in_a_file_of_options_is_said_to_be_in_the_file(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        parse("train", ["--index", "i", "--out", "o", "--config", str(tmp_path / "options.yaml")])
    assert f"--config {tmp_path / 'options.yaml'} says --" in capsys.readouterr().err


@pytest.mark.parametrize("spelt", ["--batch-size 8 --learning-rate 0.05", "--batch_size=8 --learning_rate=0.05"])
@pytest.mark.parametrize("preset", ["full", "report"])
def test_a_batch_size_or_learning_rate_that_is_given_wins_over_the_lists_of_a_preset(preset: str, spelt: str) -> None:
    config = parse("tune", ["--index", "i", "--out", "o", "--preset", preset, *spelt.split()])
    assert {(trial.fit.batch_size, trial.fit.learning_rate) for trial in draw_trials(config)} == {(8, 0.05)}


@pytest.mark.parametrize("wrong", [("--engine", "foo"), ("--top-k", "0")])
def test_a_script_reads_of_wrong_options_in_one_line_of_json_and_a_person_what_is_wrong(
    wrong: tuple[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "to_standard_error", lambda: None)
    assert run_job("score", ["--json", "--package", "p", "--images", "i", "--out", "o", *wrong]) == 2
    told = capfd.readouterr()
    assert json.loads(told.out)["exit_code"] == 2
    assert wrong[0] in told.err
    assert "(exit code 2)" in told.err


def test_of_wrong_options_the_last_line_has_the_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_job("score", ["--bogus", "1"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "fruitray score: wrong options: see above (exit code 2)"


def test_a_place_below_a_folder_whose_name_is_no_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=r"caf\\xe9/raw: its name is not UTF-8"):
        resolved(ScoreConfig(package="/p", images=("raw",), out="/o"))


@pytest.mark.parametrize("job", ["tune", "train"])
def test_what_learns_from_photos_writes_nothing_among_them(
    job: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    index, out = write_photos_and_index(tmp_path), tmp_path / "photos" / "model"
    assert run_job(job, ["--index", index, "--out", str(out), "--dry-run"]) == 2
    assert f"must not lie inside {tmp_path}/photos" in capfd.readouterr().err
    assert not out.exists()


def test_a_file_uri_is_the_path_that_it_spells() -> None:
    config = resolved(ScoreConfig(package="/my%20p", images=(Path("/my photos/50%").as_uri(),), out="/o"))
    assert (config.package, config.images) == ("/my%20p", ("/my photos/50%",))


def test_a_script_reads_one_line_of_json_and_nothing_else(tmp_path: Path) -> None:
    for options, code in ((("--places", str(tmp_path)), 0), (("--places", str(tmp_path / "absent")), 6)):
        command = [sys.executable, "-m", "jobs.doctor", "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        said = json.loads(done.stdout)
        assert (done.returncode, said["exit_code"], said["job"]) == (code, code, "doctor")
        assert "computes in" in done.stderr
        assert ("no such file or folder" in said["said"]) == bool(code)


def test_train_starts_from_a_best_json_and_options_win(tmp_path: Path) -> None:
    best = tmp_path / "best.json"
    best.write_text(
        json.dumps({"model": {"backbone": "cnn", "weights": "none"}, "fit": {"batch_size": 8, "epochs": 5}})
    )
    parsed = parse("train", ["--index", "i", "--out", "o", "--config", str(best), "--epochs", "7"])
    assert parsed.model == ModelConfig(backbone="cnn", weights="none")
    suits_cnn = {"learning_rate": 1e-4, "trunk_rate": 1.0, "head_epochs": 0}
    assert parsed.fit == replace(RECIPES["whole"], batch_size=8, epochs=7, **suits_cnn), (
        "what is not said, the recipe says"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--backbone resnet50", {"learning_rate": 1e-3, "head_epochs": 1, "trunk_rate": 0.5, "augment": "crop+mirror"}),
        ("--backbone vgg16", {"learning_rate": 1e-4}),
        ("--backbone vgg16 --frozen", {"learning_rate": 1e-3}),
        ("--backbone timm/resnet50_gn", {"learning_rate": 1e-4}),
        ("--backbone timm/vit_tiny_patch16_224", {"learning_rate": 1e-4}),
        ("--backbone timm/tf_efficientnetv2_b0 --weights none", {"learning_rate": 1e-3, "head_epochs": 0}),
        ("--backbone cnn_bn", {"learning_rate": 3e-3, "head_epochs": 0, "trunk_rate": 1.0, "augment": "crop+mirror"}),
        ("--backbone resnet50 --weights none", {"head_epochs": 0, "trunk_rate": 1.0}),
        ("--backbone resnet50 --epochs 1 --ema 0", {"epochs": 1, "head_epochs": 0, "ema": 0.0}),
        ("--backbone resnet50 --frozen", {"augment": "mirror", "head_epochs": 0, "batch_size": 64}),
        ("--recipe report --epochs 3", {"augment": "eightfold", "optimizer": "adam", "batch_size": 8, "epochs": 3}),
        ("--recipe head --backbone cnn", {"augment": "mirror", "learning_rate": 1e-4}),
    ],
)
def test_train_starts_from_what_suits_or_from_a_recipe(options: str, expected: dict[str, object]) -> None:
    fit = parse("train", ["--index", "i", "--out", "o", *options.split()]).fit
    assert {name: getattr(fit, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ("prepare", "--images", "x", "--out", "y", "--val-fraction", "1.5"),
            2,
            "--val-fraction 1.5: must lie between",
        ),
        (("prepare", "--images", "{tmp}/absent", "--out", "{tmp}/out"), 6, "no such file or folder"),
        (("prepare", "--images", __file__, "--out", "{tmp}/out"), 6, "a file is there, where a folder is needed"),
        (("prepare", "--images", "{tmp}", "--out", "{tmp}/out"), 2, "must not lie inside"),
        (("prepare", "--images", "{tmp}", "--out", "s3://"), 2, "names no bucket"),
        (("prepare", "--images", "{tmp}", "--out", "s3:///"), 2, "names no bucket"),
        (("prepare", "--images", "{tmp}", "--out", ""), 2, "--out '': must name a place"),
        (("prepare", "--images", "file://", "--out", "{tmp}/out"), 2, "'file://': must name a place"),
        (("prepare", "--images", "{tmp}/na\udcefve", "--out", "{tmp}/out"), 2, "not UTF-8"),
        (("prepare", "--images", "ftp://host/x", "--out", "{tmp}/out"), 2, "s3://bucket/prefix"),
        (("train", "--index", "{tmp}", "--out", "{tmp}/m", "--config", "{tmp}/absent.json"), 6, "absent.json"),
        (("score", "--package", "{tmp}", "--images", "{tmp}", "--out", "{tmp}-out"), 7, "no model package"),
        (("score", "--package", "x", "--images", "y", "--out", "z", "--retry-errors"), 2, "needs --previous"),
        (
            ("score", "--package", "x", "--images", "y", "--out", "z", "--cost-per-hour", "-1"),
            2,
            "must be a number from 0 up",
        ),
        (("score", "--package", "x", "--images", "y", "--out", "z", "--cost-per-hour", "inf"), 2, "from 0 up"),
        (("tune", "--index", "x", "--out", "y", "--dropouts", "0.2", "2"), 2, "--dropouts (0.2, 2.0): all must lie in"),
        (("tune", "--index", "x", "--out", "y", "--learning-rates", "1e-3", "inf"), 2, "--learning-rates inf"),
        (("tune", "--index", "x", "--out", "y", "--image-size", "5"), 2, "--image-size 5: must be at least 32"),
        (("tune", "--index", "x", "--out", "y", "--crop", "7"), 2, "--crop 7.0: must lie in [0, 1]"),
        (("tune", "--index", "x", "--out", "y", "--hidden", "-1"), 2, "--hidden -1: must be a number from 0 up"),
        (("tune", "--index", "x", "--out", "y", "--gpus-per-trial", "1.5"), 2, "above 1 it must be a whole number"),
        (("tune", "--index", "x", "--out", "y", "--cpus-per-trial", "0.00001"), 2, "ten thousandths"),
        (("train", "--index", "x", "--out", "y", "--clip-norm", "inf"), 2, "--clip-norm inf: must be a number from 0"),
        (
            ("train", "--index", "x", "--out", "y", "--frozen", "--weights", "none"),
            2,
            "--weights none: leaves --frozen",
        ),
        (("prepare", "--images", "x", "--out", "y", "--probe", "cnn"), 2, "--probe cnn: nobody has weights"),
        (
            ("prepare", "--images", "x", "--out", "y", "--probe", "resnet50", "--weights", "none"),
            2,
            "--weights none: leaves --probe",
        ),
        (("demo", "--out", "{tmp}", "--image-size", "5"), 2, "--image-size 5: must be at least 32"),
        (("demo", "--out", "{tmp}", "--trials", "0"), 2, "--trials 0: must be at least 1"),
        (("score", "--package", "x", "--images", "y", "{tmp}", "--out", "{tmp}/o"), 2, "must not lie inside"),
        (("score", "--package", "x", "--images", "{tmp}/data/raw", "--out", "{tmp}"), 2, "its rows would come to lie"),
        (("verify", "--out", "{tmp}"), 6, "score has not written here"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence_and_its_exit_code(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, *options = (argument.format(tmp=tmp_path) for argument in arguments)
    assert run_job(job, options) == code
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.strip().splitlines()) == 1


def test_an_empty_folder_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    assert run_job("prepare", ["--images", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) == 3


def test_a_page_that_is_broken_off_is_the_job_done_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: PrepareConfig) -> str:
        status.begin(LocalStorage(config.out))
        return "prepare: done"

    def draw(out: str) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("fruitray.cluster.prepare.run", run)
    monkeypatch.setattr("fruitray.cluster.report.draw", draw)
    assert run_job("prepare", ["--images", "i", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["no report was drawn: interrupted", "prepare: done"]


def test_json_says_where_a_job_writes_also_when_there_was_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_OUT", console._OUT)  # to be as it was, when --json has had its way with it
    done = SimpleNamespace(run=lambda config: "score: nothing left to do")
    monkeypatch.setattr(importlib, "import_module", lambda name: done)
    assert run_job("score", ["--package", "p", "--images", "i", "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path)
