"""A page of the report as its reader has it: opened in Chromium, at several widths, in light and in dark."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

PHOTOS = {"photos by class and split"}
TRIALS = {"time against accuracy", "learning curves, a mark at the best epoch"}
MODEL = {"loss by epoch", "accuracy by epoch", "reliability", "confidences"}
SCORES = {"rows by label", "confidences"}
"""The charts of each section."""
WIDTHS = (400, 1400)
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")


@contextmanager
def opened(file: Path, width: int, scheme: str = "light") -> Iterator[tuple[Page, list[str]]]:
    """(the page, what its console says: by rights nothing); skips the test where there is no Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("`chromium` is absent: apt-get install chromium")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=list(OPTIONS)) as browser,
    ):
        page, said = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), list[str]()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url)
        )
        page.goto(file.as_uri())
        yield page, said


def require_readable(file: Path, charts: set[str]) -> None:
    """Fail unless the page says nothing on its console, asks for nothing beside it, fits every width, has these charts,
    with something drawn in each, sorts its tables, and has no serious fault that axe-core knows."""
    for width, scheme in [(width, scheme) for width in WIDTHS for scheme in ("light", "dark")]:
        with opened(file, width, scheme) as (page, said):
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found = Axe().run(page).response["violations"]
            serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
            assert not serious, [(fault["id"], fault["nodes"][0]["html"]) for fault in serious]
            if (width, scheme) == (WIDTHS[-1], "light"):
                _require_charts(page, charts)
                _require_sorting(page)
            assert said == []


def _require_charts(page: Page, charts: set[str]) -> None:
    drawn = {
        figure.locator("figcaption").inner_text().lower(): figure.locator("svg path, svg use").count()
        for figure in page.locator("figure.chart").all()
    }
    assert charts <= drawn.keys()
    assert all(marks > 5 for marks in drawn.values()), drawn
    assert page.locator("figure.chart svg[role=img][aria-label]").count() == page.locator("figure.chart").count()
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0 && image.alt)")


def _require_sorting(page: Page) -> None:
    """Each column of each table, twice: the one way, then the other."""
    for table in page.locator("table.sortable").all():
        heads = table.locator("thead button").all()
        for column, head in enumerate(heads):
            orders = []
            for direction in ("ascending", "descending"):
                head.click()
                assert table.locator("thead th").nth(column).get_attribute("aria-sort") == direction
                cells = table.locator(f"tbody tr td:nth-child({column + 1})")
                orders.append([cell.get_attribute("data-sort") or cell.inner_text() for cell in cells.all()])
            rising, falling = ([value for value in order if value] for order in orders)
            assert rising == _sorted(page, rising), head.inner_text()
            if len(set(rising)) == len(rising):
                assert falling == rising[::-1], head.inner_text()


def _sorted(page: Page, values: list[str]) -> list[str]:
    """By number; where one of two is none, as the language of the page's reader sorts text."""
    try:
        return sorted(values, key=float)
    except ValueError:
        order = "(a, b) => a - b || a.localeCompare(b, undefined, {numeric: true})"
        collated: list[str] = page.evaluate(f"values => values.sort({order})", values)
        return collated
