"""The `fruitray` command and the jobs' shared entry: arguments -> config -> the room that obeys it -> exit code.

Nothing heavy is imported before a job runs, so `--help` answers at once.
"""

import importlib
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from fruitray import config as configs
from fruitray import status
from fruitray.console import say
from fruitray.errors import UsageError, find_ours
from fruitray.storage import Storage

JOBS: dict[str, type[Any]] = {
    "prepare": configs.PrepareConfig,
    "tune": configs.TuneConfig,
    "train": configs.TrainConfig,
    "score": configs.ScoreConfig,
    "verify": configs.VerifyConfig,
    "export": configs.ExportConfig,
    "report": configs.ReportConfig,
    "demo": configs.DemoConfig,
}
"""Each job's config; `fruitray.cluster.NAME.run(config)` does the work and answers the line to end with."""


def main(argv: Sequence[str] | None = None) -> None:
    """`fruitray NAME [options]`: the same as `python -m jobs.NAME [options]`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in JOBS:
        sys.exit(run_job(arguments[0], arguments[1:]))
    asked = arguments in ([], ["-h"], ["--help"])
    lines = [f"  {name:<9}{_first_line(config)}" for name, config in JOBS.items()]
    print("\n".join(["usage: fruitray JOB [options]; fruitray JOB --help lists them", "", *lines]))
    if not asked:
        print(f"\nfruitray: there is no job {arguments[0]!r}", file=sys.stderr)
    sys.exit(0 if asked else UsageError.exit_code)


def run_job(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one job with command-line arguments; answers its exit code (see `errors.py`)."""
    with status.of(name) as told:
        try:
            config = configs.resolved(parse(name, list(sys.argv[1:] if argv is None else argv)))
            job = importlib.import_module(f"fruitray.cluster.{name}")
            said, code = job.run(config), 0
            told.end(code, said)
            if told.out is not None and config.report:
                _write_report(told.out)
        except KeyboardInterrupt:
            said, code = "interrupted", status.INTERRUPTED
        except Exception as error:
            ours = find_ours(error)
            if ours is None:
                raise
            said, code = str(ours), ours.exit_code
        print(f"fruitray {name}: {said}" if code else said, file=sys.stderr if code else sys.stdout, flush=True)
        told.end(code, said)
        return code


def _write_report(out: Storage) -> None:
    """A page of what the job has found; without it the job has done its work all the same."""
    try:
        from fruitray.report.page import FILE, write_report

        out.write(FILE, write_report([out.uri]))
        say(f"see {out.uri_of(FILE)}")
    except Exception as error:
        say(f"no report could be drawn: {type(error).__name__}: {error}")


def parse(name: str, argv: Sequence[str]) -> Any:
    """The job's config from its arguments; ends the process with 2 where they make no sense, with 0 after `--help`."""
    kind = JOBS[name]
    default = {"train": _of_best_or_recipe, "tune": _of_preset}.get(name, lambda _: None)(argv)
    return tyro.cli(
        kind,
        args=argv,
        prog=f"fruitray {name}",
        description=_first_line(kind),
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _of_preset(argv: Sequence[str]) -> Any:
    """What `tune --preset NAME` starts from, None where it is not to be had."""
    from fruitray.search import PRESETS

    name = _given(argv, "--preset")
    if name not in PRESETS:
        return None
    options: dict[str, Any] = {"preset": name, **PRESETS[name]}
    return configs.TuneConfig(index=tyro.MISSING, out=tyro.MISSING, **options)


def _given(argv: Sequence[str], option: str) -> str | None:
    """The value of `option` among the arguments."""
    value = next((b for a, b in itertools.pairwise(argv) if a == option), None)
    return next((a.partition("=")[2] for a in argv if a.startswith(f"{option}=")), value)


def _of_best_or_recipe(argv: Sequence[str]) -> Any:
    """What `train` starts from: with `--config URI` that, else a recipe."""
    path = _given(argv, "--config")
    if path is not None:
        return _of_best(path)
    asked = next((name for name in configs.RECIPES if name == _given(argv, "--recipe")), None)
    fit = configs.RECIPES[asked or ("head" if "--frozen" in argv else "whole")]
    return configs.TrainConfig(index=tyro.MISSING, out=tyro.MISSING, recipe=asked or "suited", fit=fit)


def _of_best(path: str) -> Any:
    """What the best.json at `path` says."""
    from fruitray.storage import open_file

    storage, key = open_file(path)
    try:
        given = json.loads(storage.read(key))
        model, fit = configs.ModelConfig(**given["model"]), configs.FitConfig(**given["fit"])
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--config {path}: not a best.json that tune wrote ({error})") from error
    return configs.TrainConfig(index=tyro.MISSING, out=tyro.MISSING, config=path, model=model, fit=fit)


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
