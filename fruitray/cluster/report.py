"""report: the page of what jobs have written. Needs no cluster; it stands here so that every job is in one place."""

from fruitray.cluster.runtime import open_input, open_output
from fruitray.config import ReportConfig
from fruitray.report.page import FILE, write_report


def run(config: ReportConfig) -> str:
    """Read, draw, write; an error says which place holds nothing."""
    for place in config.runs:
        open_input(place)
    out = open_output(config.out or config.runs[0])
    page = write_report(config.runs)
    out.write(FILE, page)
    return f"report: {len(page) / 1e6:.1f} MB in {out.uri_of(FILE)}"
