"""The guides name every column and every error code, as the code does, and lead where they say."""

import re
from pathlib import Path

import pyarrow as pa
import pytest

from fruitray import evaluation, final, index, scores, suspects, trials
from fruitray.images import CODES
from fruitray.rules import REASONS
from tests.cluster import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "infra" / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def _table(head: str, rows: list[tuple[str, ...]]) -> str:
    cells = [tuple(head.split()), ("---",) * len(rows[0]), *((f"`{name}`", *more) for name, *more in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _columns(schema: pa.Schema) -> str:
    return _table(
        "column type what", [(one.name, str(one.type), one.metadata[b"description"].decode()) for one in schema]
    )


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("prepare", _columns(index.SCHEMA)),
        ("prepare", _table("reason what", list(REASONS.items()))),
        ("prepare", _columns(suspects.SCHEMA)),
        ("train", _columns(final.HISTORY)),
        ("train", _columns(evaluation.PREDICTIONS)),
        ("tune", _columns(trials.SCHEMA)),
        ("score", _columns(scores.schema(embeddings=True))),
        ("score", _table("code what", list(CODES.items()))),
    ],
)
def test_a_guide_has_the_table(page: str, table: str) -> None:
    assert table in (ROOT / "docs" / f"{page}.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, chapter = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not chapter or chapter in _chapters(there), target


def _chapters(page: Path) -> list[str]:
    """As GitHub names them in links."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
