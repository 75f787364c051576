"""The `fruitray` command and the jobs' shared entry: arguments -> config -> the room that obeys it -> exit code.

Nothing heavy is imported before a job runs, so `--help` answers at once.
"""

import difflib
import importlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import tyro

from fruitray import config as configs
from fruitray import console, status
from fruitray.console import say
from fruitray.defaults import default_of, from_file, given
from fruitray.errors import TooManyBadImagesError, TrialsFailedError, UsageError, find_ours

GROUPS: dict[str, dict[str, type[Any]]] = {
    "from photos to a model": {
        "prepare": configs.PrepareConfig,
        "tune": configs.TuneConfig,
        "train": configs.TrainConfig,
    },
    "from a model to a table": {
        "score": configs.ScoreConfig,
        "verify": configs.VerifyConfig,
        "export": configs.ExportConfig,
    },
    "to see": {
        "report": configs.ReportConfig,
        "demo": configs.DemoConfig,
        "doctor": configs.DoctorConfig,
    },
}
JOBS = {name: kind for jobs in GROUPS.values() for name, kind in jobs.items()}
"""Each job's config; `fruitray.cluster.NAME.run(config)` does the work and answers the line to end with."""
EXAMPLES = """examples:
  fruitray demo
  fruitray prepare --images raw --out runs/index
  fruitray train --index runs/index --out runs/model --backbone mobilenet_v2
  fruitray score --package runs/model --images s3://bucket/new --out s3://bucket/scores

fruitray JOB --help lists a job's options; --json beside them ends a job with one line of JSON, and moves all else, and
what is wrong with the options, to the standard error. `fruitray completion bash` (or zsh) prints what completes all
this in a shell."""
JSON = "--json"
WRITTEN = (TooManyBadImagesError, TrialsFailedError)
"""Errors that come when all is written."""
SHELLS = ("bash", "zsh")


def main(argv: Sequence[str] | None = None) -> None:
    """`fruitray NAME [options]`: the same as `python -m jobs.NAME [options]`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in JOBS:
        sys.exit(run_job(arguments[0], arguments[1:]))
    if arguments[:1] == ["completion"]:
        sys.exit(_complete(arguments[1:]))
    with _while_read():
        print("\n".join(["usage: fruitray JOB [options]", *_listed(), "", EXAMPLES]))
    if arguments in ([], ["-h"], ["--help"]):
        sys.exit(0)
    near = difflib.get_close_matches(arguments[0], JOBS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    print(f"\nfruitray: there is no job {arguments[0]!r}{meant}", file=sys.stderr)
    sys.exit(UsageError.exit_code)


def _listed() -> list[str]:
    lines = []
    for title, jobs in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<9}{_first_line(kind)}" for name, kind in jobs.items())]
    return lines


def _complete(shell: Sequence[str]) -> int:
    """Print the script that completes jobs and options in a shell."""
    if list(shell) not in [[name] for name in SHELLS]:
        print(f"usage: fruitray completion {{{','.join(SHELLS)}}}", file=sys.stderr)
        return UsageError.exit_code
    options = ["--tyro-print-completion", shell[0]]
    with suppress(SystemExit), _while_read():
        tyro.extras.subcommand_cli_from_dict(
            {**JOBS}, prog="fruitray", args=options, config=(tyro.conf.OmitArgPrefixes,)
        )
    return 0


def run_job(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one job with command-line arguments; answers its exit code (see `errors.py`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = JSON in arguments
    if as_json:
        arguments.remove(JSON)
        console.to_standard_error()
    config: Any = None
    with status.of(name) as told:
        try:
            config = configs.resolved(parse(name, arguments))
            job = importlib.import_module(f"fruitray.cluster.{name}")
            said, code, worth_a_look = job.run(config), 0, True
        except KeyboardInterrupt:
            said, code, worth_a_look = "interrupted", status.INTERRUPTED, False
        except SystemExit as ended:
            if ended.code != UsageError.exit_code:
                raise
            where = "the standard error" if as_json else "above"
            said, code, worth_a_look = f"wrong options: see {where}", UsageError.exit_code, False
        except Exception as error:
            ours = find_ours(error)
            if ours is None:
                raise
            said, code, worth_a_look = str(ours), ours.exit_code, isinstance(ours, WRITTEN)
        told.end(code, said)
        if told.out is not None and worth_a_look and config.report:
            _draw_report(told.out.uri)
        if code:
            print(f"fruitray {name}: {said} (exit code {code})", file=sys.stderr, flush=True)
        if as_json:
            out = told.out.uri if told.out else getattr(config, "out", None)
            print(json.dumps({**told.facts, "out": out, "exit_code": code, "said": said}), flush=True)
        elif not code:
            say(said)
        return code


def _draw_report(out: str) -> None:
    """A page of what the job has found; without it the job has done its work all the same."""
    try:
        from fruitray.cluster.report import draw

        say(f"see {draw(out)}")
    except KeyboardInterrupt:
        say("no report was drawn: interrupted")
    except Exception as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        say(f"no report could be drawn: {find_ours(error) or f'{type(error).__name__}: {last}'}")


def parse(name: str, argv: Sequence[str]) -> Any:
    """The job's config from its arguments; ends the process with 2 where they make no sense, with 0 after `--help`."""
    kind = JOBS[name]
    filed = from_file(kind, argv)
    arguments = [*filed, *argv]
    try:
        with _while_read():
            return tyro.cli(
                kind,
                args=arguments,
                prog=f"fruitray {name}",
                description=_first_line(kind),
                default=default_of(name, arguments),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as ended:
        if filed and ended.code:
            print(f"fruitray {name}: --config {given(argv, '--config')} says {shlex.join(filed)}", file=sys.stderr)
        raise


@contextmanager
def _while_read() -> Iterator[None]:
    """Ends the process with 0 when nobody reads on, as where `head` has had enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
