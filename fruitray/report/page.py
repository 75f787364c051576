"""Sections -> one HTML file that needs nothing beside it: style, script and photos stand within."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2

from fruitray import __version__
from fruitray.commit import read_plan
from fruitray.errors import FruitrayError, NoInputError
from fruitray.report.blocks import Section, Table, Text
from fruitray.report.outputs import Output, find_outputs

FILE = "report.html"


def write_report(places: Sequence[str]) -> bytes:
    """The page of what lies in `places`, and of what that was made from.

    Raises:
        NoInputError: no job has written there.
    """
    outputs = find_outputs(places)
    if not outputs:
        raise NoInputError(" ".join(places), "holds nothing that a job wrote")
    jobs = Table("what ran", [_job(output) for output in outputs.values()])
    sections = [*(_section(job, outputs) for job in outputs), Section("jobs", "Jobs", "", [jobs])]
    return render(_title(outputs), sections)


def _section(job: str, outputs: dict[str, Output]) -> Section:
    """What `job` wrote; a sentence where it cannot be read."""
    from fruitray.report.model import model
    from fruitray.report.photos import photos
    from fruitray.report.scoring import scoring
    from fruitray.report.trials import trials

    output, index = outputs[job], outputs.get("prepare")
    made: dict[str, Callable[[], Section]] = {
        "prepare": lambda: photos(output),
        "tune": lambda: trials(output),
        "train": lambda: model(output, index),
        "score": lambda: scoring(output, outputs.get("train")),
    }
    try:
        section, warning = made[job](), ""
        with suppress(FruitrayError):  # what it was made from need not be readable
            warning = _mismatch(output, outputs)
        return replace(section, blocks=[Text(warning), *section.blocks]) if warning else section
    except Exception as error:  # of many types: what lies there may be anybody's, or half of it gone
        said = str(error) if isinstance(error, FruitrayError) else f"{type(error).__name__}: {error}"
        return Section(job, job, "This part could not be read.", [Text(said)])


def _mismatch(output: Output, outputs: dict[str, Output]) -> str:
    """What the page shows of another index or model than `output` was made from, in a sentence; empty for nothing."""
    index, model = outputs.get("prepare"), outputs.get("train")
    known = output.options.get("index_sha256")
    if output.job in ("tune", "train") and index and known and index.sha256 != known:
        return "This was made from another index than this page shows, as where the photos were prepared anew since."
    if output.job == "score" and model and model.sha256 != read_plan(output.storage).settings["model_id"]:
        return "These rows are of another model than this page shows, as where one was trained anew since."
    return ""


def render(title: str, sections: Sequence[Section]) -> bytes:
    """The page as UTF-8. Whatever stands in a name is shown, never obeyed."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fruitray.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(shown=_shown, sorts=_sorts)
    environment.tests.update(kind=lambda block, name: type(block).__name__ == name)
    page = environment.get_template("page.html").render(
        title=title,
        sections=sections,
        style=_file("page.css"),
        script=_file("page.js"),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
    )
    return page.encode()


def _title(outputs: dict[str, Output]) -> str:
    classes = outputs["train"].json("package.json")["classes"] if "train" in outputs else None
    named = " / ".join(map(str, classes[:6])) if isinstance(classes, list) else ""
    return named or next(iter(outputs.values())).storage.uri.rpartition("/")[2]


def _job(output: Output) -> dict[str, Any]:
    """A row of the table of jobs."""
    said = output.status
    return {
        "job": output.job,
        "state": said.get("state"),
        "started": _time(said.get("started")),
        "took, s": _took(said),
        "where": output.storage.uri,
        "versions": ", ".join(f"{name} {number}" for name, number in dict(said.get("versions") or {}).items()),
    }


def _time(stamp: str | None) -> str:
    with suppress(TypeError, ValueError):
        return f"{datetime.fromisoformat(stamp or ''):%Y-%m-%d %H:%M} UTC"
    return ""


def _took(said: dict[str, Any]) -> int | None:
    with suppress(KeyError, TypeError, ValueError):
        start, end = (datetime.fromisoformat(said[name]) for name in ("started", "updated"))
        return round((end - start).total_seconds())
    return None


def _file(name: str) -> str:
    return resources.files("fruitray.report").joinpath(name).read_text()


def _shown(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"
    return str(value)


def _sorts(value: Any) -> str:
    """What a cell is sorted by: a number in full, else the text."""
    return repr(float(value)) if isinstance(value, int | float) else ""
