"""The command line: help without heavy imports, arguments to configs, errors to exit codes."""

import ast
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from fruitray import config
from fruitray.cli import JOBS, main, parse, run_job
from fruitray.config import FitConfig, ModelConfig

HEAVY = {"boto3", "pyarrow", "ray", "torch", "torchvision", "torchvision.models"}


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


def test_every_option_is_explained() -> None:
    for kind in ast.walk(ast.parse(Path(config.__file__).read_text())):
        for field, after in pairwise(getattr(kind, "body", []) if isinstance(kind, ast.ClassDef) else []):
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


def test_train_starts_from_a_best_json_and_options_win(tmp_path: Path) -> None:
    best = tmp_path / "best.json"
    best.write_text(
        json.dumps({"model": {"backbone": "cnn", "weights": "none"}, "fit": {"batch_size": 8, "epochs": 5}})
    )
    parsed = parse("train", ["--index", "i", "--out", "o", "--config", str(best), "--epochs", "7"])
    assert parsed.model == ModelConfig(backbone="cnn", weights="none")
    assert parsed.fit == FitConfig(batch_size=8, epochs=7, learning_rate=1e-4, trunk_rate=1.0), "what suits cnn"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--backbone resnet50", {"learning_rate": 1e-3, "head_epochs": 1, "trunk_rate": 0.5, "augment": "crop+mirror"}),
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
        (("prepare", "--images", "{tmp}", "--out", "{tmp}/out"), 2, "must not lie inside"),
        (("prepare", "--images", "ftp://host/x", "--out", "{tmp}/out"), 2, "s3://bucket/prefix"),
        (("train", "--index", "{tmp}", "--out", "{tmp}/m", "--config", "{tmp}/absent.json"), 6, "absent.json"),
        (("score", "--package", "{tmp}", "--images", "{tmp}", "--out", "{tmp}-out"), 7, "no model package"),
        (("score", "--package", "x", "--images", "y", "--out", "z", "--retry-errors"), 2, "needs --previous"),
        (
            ("score", "--package", "x", "--images", "y", "--out", "z", "--cost-per-hour", "-1"),
            2,
            "must not be negative",
        ),
        (("score", "--package", "x", "--images", "y", "{tmp}", "--out", "{tmp}/o"), 2, "must not lie inside"),
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
