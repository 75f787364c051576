"""What a person sees: lines, tables and progress. On a terminal a live bar; in a job's log a line now and then.

A worker's lines, and how far it is, are for the driver to show: `tell` hands them on.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

LOG_INTERVAL_S = 10.0
LOG_WIDTH = 220
"""Characters of a table's line in a log."""
SHOWN = 10
"""Lines of a table of which a file has more."""

_OUT = Console(highlight=False, soft_wrap=True)
_hear: Callable[[str | int], object] | None = None
_shown: dict[str, Any] = {}
_advance: Callable[..., None] | None = None


def to_standard_error() -> None:
    """From now on show all there, where a script reads the standard output."""
    global _OUT
    _OUT = Console(highlight=False, soft_wrap=True, stderr=True)


def tell(hear: Callable[[str | int], object]) -> None:
    """From now on say nothing in this process: `hear` gets each line, and each count that `reached` is given."""
    global _hear
    _hear = hear


def say(text: str) -> None:
    """One line, as it is."""
    if _hear:
        _hear(text)
    else:
        _OUT.print(text, markup=False, emoji=False)


def show_table(title: str, rows: Sequence[Mapping[str, Any]], at_most: int | None = None) -> None:
    """`rows`, or `at_most` so many of them, as a table: a column per key of the first one, numbers to the right; where
    there is too little room, the last columns are left out."""
    if not rows:
        return
    screen = Console(highlight=False, stderr=_OUT.stderr, width=None if _OUT.is_terminal else LOG_WIDTH)
    names: list[str] = []
    room = screen.width - 1
    for name in rows[0]:
        room -= 3 + max(
            cell_len(line) for row in [{name: name}, *rows[:at_most]] for line in _cell(row[name]).split("\n")
        )
        if names and room < 0:
            break
        names.append(name)
    screen.print(_table(title, names, rows[:at_most]))
    if left_out := list(rows[0])[len(names) :]:
        say(f"not shown, for want of room: {', '.join(left_out)}")
    if at_most is not None and len(rows) > at_most:
        say(f"... and {len(rows) - at_most:,} more")


def _table(title: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in names:
        justify: Any = "right" if isinstance(rows[0][name], int | float) else "left"
        table.add_column(Text(name), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_cell(row[name])) for name in names))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def progress(what: str, total: int, unit: str, *, in_logs: bool = True) -> Iterator[Callable[..., None]]:
    """Yields `advance(count, note="")`; shows how many of `total` `unit` are done, how fast, what is left, the note.
    `in_logs`: in a log, too; a job that has lines of its own to say does without."""
    global _advance
    live = _live if _OUT.is_terminal and not _hear else _logged if in_logs else _silent
    _shown.update(step=what, done=0, total=total, unit=unit)
    with live(what, total, unit) as show:

        def advance(count: int, note: str = "") -> None:
            _shown["done"] += count
            show(count, note)

        _advance = advance
        yield advance
    _advance = None
    _shown.clear()


def reached(done: int) -> None:
    """Of the progress under way so much is done, all in all."""
    if _hear:
        _hear(done)
    elif _advance and done > _shown["done"]:
        _advance(done - _shown["done"])


def shown() -> dict[str, Any]:
    """The progress under way, or broken off: `step`, `done` of `total`, `unit`; empty where there is none."""
    return dict(_shown)


@contextmanager
def _live(what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    numbers = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[speed]}"))
    with Progress(TextColumn("{task.description}"), *numbers, TextColumn("{task.fields[note]}"), console=_OUT) as bar:
        task = bar.add_task(what, total=total, speed="", note="")
        first: tuple[int, float] | None = None  # what was there, and when: a job that resumes has not done it just now
        done = 0

        def advance(count: int, note: str = "") -> None:
            nonlocal done, first
            done, now = done + count, time.monotonic()
            first = first or (done, now)
            rate = (done - first[0]) / max(now - first[1], 1e-9)
            speed = f"{rate:,.3g}/s, {(total - done) / rate:,.0f} s left" if rate else ""
            bar.update(task, advance=count, speed=speed, note=note)

        yield advance


@contextmanager
def _logged(what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    start = last = time.monotonic()
    done, said, noted = 0, -1, ""

    def line() -> None:
        nonlocal said
        said = done
        seconds = max(time.monotonic() - start, 1e-9)
        left = f", {(total - done) * seconds / done:,.0f} s left" if 0 < done < total else ""
        so_far = f", {noted}" if noted else ""
        say(f"{what}: {done:,} of {total:,} {unit}, {seconds:.0f} s, {done / seconds:,.1f} {unit}/s{left}{so_far}")

    def advance(count: int, note: str = "") -> None:
        nonlocal done, last, noted
        done, noted = done + count, note
        if time.monotonic() - last >= LOG_INTERVAL_S:
            last = time.monotonic()
            line()

    yield advance
    if said != done:
        line()


@contextmanager
def _silent(what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    yield lambda count, note: None
