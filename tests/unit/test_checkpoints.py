"""Of checkpoints only whole ones are ever loaded, the newest first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fruitray import checkpoints
from fruitray.checkpoints import KEPT, Pace, delete_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from fruitray.errors import TryAgainError
from fruitray.storage import LocalStorage


@pytest.fixture
def out(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


def state(number: int, step: int = 0) -> dict[str, Any]:
    return {"number": number, "step": step, "weights": torch.full((3,), number + step / 100), "history": [{"a": 0.5}]}


def newest(out: LocalStorage) -> tuple[dict[str, Any] | None, list[str]]:
    """(the newest whole state, what was said)."""
    told: list[str] = []
    name = newest_checkpoint(out, told.append)
    return (load_checkpoint(out, name) if name else None), told


def place(found: tuple[dict[str, Any] | None, list[str]]) -> tuple[int, int] | None:
    return None if found[0] is None else (found[0]["number"], found[0]["step"])


def test_what_was_saved_is_loaded(out: LocalStorage) -> None:
    assert newest(out) == (None, [])
    save_checkpoint(out, state(2, 16))
    found, told = newest(out)
    assert found is not None
    assert torch.equal(found.pop("weights"), state(2, 16)["weights"])
    assert (found, told) == ({"number": 2, "step": 16, "history": [{"a": 0.5}]}, [])


def test_the_newest_is_that_of_most_epochs_and_then_steps(out: LocalStorage) -> None:
    for number, step, expected in ((9, 0, (9, 0)), (10, 8, (10, 8)), (10, 0, (10, 8)), (1, 99, (10, 8))):
        save_checkpoint(out, state(number, step))
        assert place(newest(out)) == expected


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("kind", ["pt", "json"])
@pytest.mark.parametrize(
    "damage", [flip, lambda data: data[:-1], lambda data: b"", None], ids=["flip", "cut", "empty", "gone"]
)
def test_a_damaged_one_is_never_loaded(out: LocalStorage, kind: str, damage: Callable[[bytes], bytes] | None) -> None:
    save_checkpoint(out, state(1))
    name = save_checkpoint(out, state(2))
    file = Path(out.uri_of(f"{name}.{kind}"))
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    found = newest(out)
    assert place(found) == (1, 0)
    missing = kind == "json" and damage is None  # then it was never committed
    assert [name in line and "the one before it" in line for line in found[1]] == [True] * (not missing)


def test_damaged_ones_do_not_stand_in_the_way_of_new_ones(out: LocalStorage) -> None:
    for number in (8, 9):
        Path(out.uri_of(f"{save_checkpoint(out, state(number))}.pt")).write_bytes(b"PK")
    found, told = newest(out)
    assert found is None
    assert ["there is none before it" in line for line in told] == [False, True]
    save_checkpoint(out, state(1))
    assert place(newest(out)) == (1, 0)


def test_what_cannot_be_had_just_now_is_no_damage(out: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> bytes:
        raise TryAgainError("there", "busy")

    save_checkpoint(out, state(1))
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "read", busy)
        with pytest.raises(TryAgainError, match="busy"):
            newest(out)
    assert place(newest(out)) == (1, 0)


def test_one_that_is_damaged_after_it_was_chosen_is_not_loaded(out: LocalStorage) -> None:
    name = save_checkpoint(out, state(1))
    assert newest_checkpoint(out, print) == name
    file = Path(out.uri_of(f"{name}.pt"))
    file.write_bytes(flip(file.read_bytes()))
    with pytest.raises(TryAgainError, match="SHA-256"):
        load_checkpoint(out, name)


def test_without_any_whole_one_there_is_none(out: LocalStorage) -> None:
    name = save_checkpoint(out, state(1))
    Path(out.uri_of(f"{name}.pt")).write_bytes(b"PK")
    assert place(newest(out)) is None


def test_old_ones_and_leftovers_of_broken_uploads_go(out: LocalStorage) -> None:
    out.write("checkpoints/000001-00000000-aaaaaaaa.pt", b"half")
    for number in range(2, 8):
        save_checkpoint(out, state(number))
    left = sorted(entry.key for entry in out.list())
    assert len(left) == 2 * KEPT
    assert {key.partition("-")[0] for key in left} == {"checkpoints/000006", "checkpoints/000007"}
    Path(out.uri_of(f"checkpoints/.{'0' * 32}.fruitray-tmp")).write_bytes(b"half")  # as kill -9 leaves it
    delete_checkpoints(out)
    assert not list(Path(out.uri).rglob("*.*"))


def test_an_upload_cut_off_leaves_the_one_before(out: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(out, state(1))
    written = LocalStorage.write

    def cut(self: LocalStorage, key: str, data: bytes) -> None:
        if key.endswith(".json"):
            raise KeyboardInterrupt
        written(self, key, data)

    monkeypatch.setattr(LocalStorage, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(out, state(2))
    assert place(newest(out)) == (1, 0)


def test_a_checkpoint_that_would_run_code_is_not_loaded(out: LocalStorage, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    name = save_checkpoint(out, {**state(1), "evil": Evil()})
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_checkpoint(out, name)
    assert not (tmp_path / "ran").exists()


def test_what_takes_long_to_save_is_saved_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of steps of a second each: all that is saved takes a thirtieth of it, however long one takes."""
    now = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    for cost in (0.05, 2.0, 20.0):
        now = 0.0
        pace, saved = Pace(), 0
        for _ in range(3600):
            now += 1.0
            if pace.cheap():
                saved += 1
                with pace.saving():
                    now += cost
        assert 0.015 < saved * cost / now < 0.035, cost
