"""report: the page of what jobs have written. Needs no cluster, but where there is one, lets a worker draw."""

import ray

from fruitray.cluster.runtime import beside_driver, open_input, open_output
from fruitray.config import ReportConfig
from fruitray.report.page import FILE, write_report
from fruitray.storage import open_storage

DRAW_S = 300
"""For drawing; a job that is done does not wait longer."""


def run(config: ReportConfig) -> str:
    """Read, draw, write; an error says which place holds nothing."""
    for place in config.runs:
        open_input(place)
    out = open_output(config.out or config.runs[0])
    size = _draw(config.runs, out.uri)
    return f"report: {size / 1e6:.1f} MB in {out.uri_of(FILE)}"


def draw(out: str) -> str:
    """Draw the page of what a job has written to `out`, beside it; answers its URI.

    The rows of an index or of scores are held by a process of its own, where a cluster lends one: not by the driver.
    """
    if ray.is_initialized():
        ray.get(beside_driver(_draw, max_retries=0).remote((out,), out), timeout=DRAW_S)
    else:
        _draw((out,), out)
    return open_storage(out).uri_of(FILE)


def _draw(places: tuple[str, ...], out: str) -> int:
    page = write_report(places)
    open_storage(out).write(FILE, page)
    return len(page)
