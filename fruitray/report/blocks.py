"""What a page is made of. Each section lists its blocks; `page.html` says how each looks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """A column per key of the first row, sortable. `total` is how many rows there are where some are left out."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    total: int | None = None

    @property
    def note(self) -> str:
        """What stands below it."""
        cut = self.total is not None and self.total > len(self.rows)
        return f"{len(self.rows)} of {self.total:,} are shown." if cut else ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing of `charts.py`."""

    title: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Matrix:
    """Counts, true classes down and predicted ones across; each cell's shade is its share of the row."""

    title: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]
    normalised: bool = False

    def share(self, row: int, column: int) -> float:
        """Of the photos of that row's class."""
        return self.counts[row][column] / max(1, sum(self.counts[row]))


@dataclass(frozen=True, slots=True)
class Picture:
    """A photo, as a data URI; None where it could not be had. `lines` stand below it."""

    source: str | None
    alt: str
    lines: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Gallery:
    """Small photos side by side; `wide` ones each in a row of its own."""

    title: str
    pictures: Sequence[Picture]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Details:
    """Text that is opened on demand, in letters of one width."""

    title: str
    text: str


Block = Text | Table | Chart | Matrix | Gallery | Details


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading; `lead` says the most important thing first."""

    key: str
    title: str
    lead: str
    blocks: list[Block] = field(default_factory=list)
