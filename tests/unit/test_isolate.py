"""Whatever a photo does to the decoder, it costs one row: the photos before and after it, and we, are unharmed."""

import functools
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fruitray.errors import ImageError, TryAgainError
from fruitray.facts import look
from fruitray.images import CODES, MAX_BYTES, decode, image_error
from fruitray.isolate import LOOK, RGB, Isolated, IsolatedPool
from tests.unit.photos import JPEG

pytestmark = pytest.mark.timeout(60)

ACT = "tests.unit.misbehaving:act"
SMALL = 400 * 2**20


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    """What misbehaves on command, with little time and memory."""
    with Isolated(ACT, timeout_s=0.6, memory=SMALL) as it:
        yield it


@pytest.fixture(scope="module")
def patient() -> Iterator[Isolated]:
    """The same with the usual time and memory."""
    with Isolated(ACT) as it:
        yield it


@pytest.fixture(scope="module")
def starved() -> Iterator[Isolated]:
    """The same with little memory."""
    with Isolated(ACT, memory=SMALL) as it:
        yield it


def child_of(isolated: Isolated) -> psutil.Process:
    return psutil.Process(isolated(b"about")["pid"])


def has_ended(child: psutil.Process) -> bool:
    try:
        return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE  # where nobody collects orphans
    except psutil.NoSuchProcess:
        return True


def said(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def code_of(isolated: Isolated, data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        isolated(data)
    assert caught.value.detail.startswith(CODES[caught.value.code])
    return caught.value.code


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- Photos that are photos


def test_a_photo_is_looked_at_as_if_here() -> None:
    with Isolated() as isolated:
        assert isolated(JPEG) == look(JPEG)


def test_a_photo_that_is_refused_is_refused_in_the_same_words(patient: Isolated) -> None:
    with pytest.raises(ImageError) as caught:
        patient(b"refuse")
    assert vars(caught.value) == vars(ImageError("E_CORRUPT", "the image data is damaged (ü)"))


def test_one_child_answers_many_calls(patient: Isolated) -> None:
    child = child_of(patient)
    photos = [b"%d" % number * (number % 97) for number in range(1_000)]
    assert [patient(photo) for photo in photos] == [said(photo) for photo in photos]
    assert child_of(patient) == child


@pytest.mark.parametrize("size", [0, 1, 2**16, MAX_BYTES])
def test_photos_of_any_size_arrive(patient: Isolated, size: int) -> None:
    photo = os.urandom(1_024) * (size // 1_024) + b"." * (size % 1_024)
    assert patient(photo) == said(photo)


def test_long_answers_arrive(patient: Isolated) -> None:
    assert patient(b"long 30000000") == {"text": "x" * 30_000_000}


@pytest.mark.parametrize("side", [0, 1, 300, 4_000])
def test_pixels_arrive(patient: Isolated, side: int) -> None:
    photo = b"pixels %d" % side
    for answer in patient.map([photo, photo]):
        assert isinstance(answer, dict)
        assert answer["side"] == side
        np.testing.assert_array_equal(answer["pixels"], np.full((side, side, 3), 7, np.uint8), strict=True)
    assert patient(b"photo") == said(b"photo")


def test_a_photo_has_the_pixels_it_has_here() -> None:
    with Isolated(RGB) as isolated:
        np.testing.assert_array_equal(isolated(JPEG)["pixels"].transpose(2, 0, 1), decode(JPEG).pixels, strict=True)
        assert code_of(isolated, b"") == "E_EMPTY"


def test_what_the_decoder_prints_is_not_taken_for_an_answer(patient: Isolated) -> None:
    assert patient(b"talk") == {"read": "", "fd 0": ""}
    assert patient(b"photo") == said(b"photo")


# ---- Photos that are trouble


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory")


def test_time_in_which_others_have_the_cpu_does_not_count(isolated: Isolated) -> None:
    assert isolated(b"sleep 1.2") == {"slept": True}


@pytest.mark.parametrize(
    ("photo", "code", "how"),
    [
        (b"sleep", "E_TIMEOUT", "more than 3.6 s"),
        (b"match", "E_TIMEOUT", "more than 0.6 s"),
        (b"hash", "E_TIMEOUT", "more than 0.6 s"),
        (b"abort", "E_DECODE_CRASH", "SIGABRT"),
        (b"segfault", "E_DECODE_CRASH", "SIGSEGV"),
        (b"kill 9", "E_DECODE_CRASH", "SIGKILL"),
        (b"exit 0", "E_DECODE_CRASH", "exit status 0"),
        pytest.param(b"bomb", "E_DECODE_CRASH", "more memory", marks=on_linux),
        pytest.param(b"unchecked-bomb", "E_DECODE_CRASH", "SIGSEGV", marks=on_linux),
    ],
)
def test_trouble_costs_one_photo_its_row(
    isolated: Isolated, starved: Isolated, photo: bytes, code: str, how: str
) -> None:
    isolated = isolated if code == "E_TIMEOUT" else starved  # little time, and a busy machine, hide other trouble
    assert isolated(b"before") == said(b"before")
    with pytest.raises(ImageError, match=how) as caught:
        isolated(photo)
    assert caught.value.code == code
    assert caught.value.detail.startswith(CODES[code])
    assert isolated(b"after") == said(b"after")


def test_trouble_may_come_first_and_again_and_again(isolated: Isolated) -> None:
    photos = [b"abort", b"sleep", b"sleep", b"abort"]
    codes = ["E_DECODE_CRASH", "E_TIMEOUT", "E_TIMEOUT", "E_DECODE_CRASH"]
    assert [code_of(isolated, photo) for photo in photos] == codes
    assert isolated(b"after") == said(b"after")


def test_time_is_counted_per_photo(isolated: Isolated) -> None:
    assert [isolated(b"sleep 0.25") for _ in range(4)] == [{"slept": True}] * 4
    time.sleep(0.7)  # nor is it counted between them
    assert isolated(b"photo") == said(b"photo")


@on_linux
def test_a_photo_does_not_pay_for_memory_that_earlier_ones_leaked(isolated: Isolated) -> None:
    assert [isolated(b"leak 60000000") for _ in range(15)] == [{"leaked": True}] * 15


def test_a_child_killed_from_outside_between_photos_costs_none(isolated: Isolated) -> None:
    child = child_of(isolated)
    child.kill()
    wait_for(lambda: has_ended(child))
    assert isolated(b"photo") == said(b"photo")


def test_a_child_killed_from_outside_at_a_photo_costs_none(patient: Isolated) -> None:
    child = child_of(patient)
    threading.Timer(0.2, child.kill).start()
    assert patient(b"sleep 0.4") == {"slept": True}
    assert has_ended(child)


def test_children_that_never_live_to_be_asked_are_a_passing_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TryAgainError, match="memory"):
        Isolated(LOOK)(b"photo")


# ---- Our own bugs


@pytest.mark.parametrize(
    ("photo", "what"),
    [
        (b"bug", r"in our_bug(.|\n)*KeyError: 'a bug of ours'"),
        (b"leave", "SystemExit: gone"),
        (b"not-json", "object is not JSON serializable"),
        (b"not-json-but-pixels", "object is not JSON serializable"),
    ],
)
def test_a_bug_of_ours_is_no_bad_photo(patient: Isolated, photo: bytes, what: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{ACT} failed(.|\n)*{what}"):
        patient(photo)
    assert patient(b"after") == said(b"after")


@pytest.mark.parametrize("name", ["no.such:place", "tests.unit.misbehaving:nothing", "math"])
def test_a_function_that_is_not_there_is_no_bad_photo(name: str) -> None:
    with Isolated(name) as isolated:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=rf"{name}(.|\n)*Error"):
                isolated(b"photo")


# ---- Many photos in a row


def test_a_row_of_photos_gets_a_row_of_answers_in_order(isolated: Isolated) -> None:
    gone = image_error("E_SRC_GONE")
    row = [b"", gone, b"abort", b"a", b"sleep", b"b", gone, gone, b"refuse", b"abort", b"abort", b"c"]
    found = [item.code if isinstance(item, ImageError) else item["size"] for item in isolated.map(row)]
    assert found == [
        *(0, "E_SRC_GONE", "E_DECODE_CRASH", 1, "E_TIMEOUT", 1, "E_SRC_GONE", "E_SRC_GONE"),
        *("E_CORRUPT", "E_DECODE_CRASH", "E_DECODE_CRASH", 1),
    ]
    assert list(isolated.map([])) == []


@pytest.mark.parametrize("children", [1, 3])
def test_a_pool_gives_answers_in_order_whatever_happens_to_its_children(children: int) -> None:
    gone = image_error("E_SRC_GONE")
    row = [b"", gone, b"abort", b"a", b"refuse", b"abort", *[b"photo"] * 40, b"abort", b"b"]
    pool = IsolatedPool(ACT, children)
    found = [item.code if isinstance(item, ImageError) else item for item in pool.map(iter(row), lambda it: it["size"])]
    crash = "E_DECODE_CRASH"
    assert found == [0, "E_SRC_GONE", crash, 1, "E_CORRUPT", crash, *[5] * 40, crash, 1]
    assert list(pool.map([], lambda it: it)) == []


def test_a_pool_tells_a_bug_of_ours(patient: Isolated) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'a bug of ours'"):
        list(IsolatedPool(ACT, 2).map([b"photo", b"bug"], lambda it: it))


def test_large_photos_and_long_answers_in_a_row_do_not_wait_for_each_other(patient: Isolated) -> None:
    long, large = b"long 1000000", bytes(MAX_BYTES)
    edges = [bytes(2**16 + step) for step in (-8_200, -8_192, -4_100, -9, -8, -1, 0, 1)]
    row = [part for photo in [large, *edges, b"", *edges, b"long 70000"] for part in (long, photo)]
    found = list(patient.map(row))
    assert found[::2] == [{"text": "x" * 1_000_000}] * (len(row) // 2)
    assert found[1:-1:2] == [said(photo) for photo in row[1:-1:2]]


def test_the_child_works_at_the_next_photo_while_we_do_something_else(patient: Isolated, tmp_path: Path) -> None:
    second = tmp_path / "2"
    answers = patient.map([b"touch", f"touch {second}".encode(), b"photo"])
    next(answers)
    wait_for(second.exists)
    assert list(answers)[1:] == [said(b"photo")]


def test_a_row_left_half_way_leaves_no_answer_to_be_mistaken(patient: Isolated) -> None:
    answers = patient.map([b"a", b"bb", b"ccc"])
    next(answers)
    assert patient(b"dddd") == said(b"dddd")
    assert list(answers) == [said(b"bb"), said(b"ccc")]


def test_a_source_that_fails_is_heard(patient: Isolated) -> None:
    def photos() -> Iterator[bytes]:
        yield b"a"
        yield b"b"
        raise ConnectionError("down")

    with pytest.raises(ConnectionError, match="down"):
        list(patient.map(photos()))
    assert patient(b"c") == said(b"c")


# ---- The child as a process


def test_a_child_runs_from_the_first_photo_to_the_end() -> None:
    before = psutil.Process().children()
    isolated = Isolated(ACT)
    isolated.close()
    assert psutil.Process().children() == before
    child = child_of(isolated)
    isolated.close()
    isolated.close()
    assert not child.is_running()  # collected, too
    child = child_of(isolated)
    del isolated
    wait_for(lambda: has_ended(child))


def test_it_travels_to_another_process_before_its_first_photo() -> None:
    with pickle.loads(pickle.dumps(Isolated(ACT))) as isolated:
        assert isolated(b"photo") == said(b"photo")


def test_the_child_is_light(patient: Isolated) -> None:
    modules = {name.partition(".")[0] for name in patient(b"modules")["modules"]}
    assert {"torch", "torchvision", "ray", "boto3", "pyarrow"} & modules == set()


@pytest.mark.parametrize(("set_to", "threads"), [(None, "1"), ("2", "2")])
def test_the_child_has_one_thread_unless_told(
    monkeypatch: pytest.MonkeyPatch, set_to: str | None, threads: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_to:
        monkeypatch.setenv("OMP_NUM_THREADS", set_to)
    with Isolated(ACT) as isolated:
        assert isolated(b"about")["OMP_NUM_THREADS"] == threads


def test_the_child_imports_from_where_its_parent_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "measured.py").write_text("def length(data): return {'length': len(data)}")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text("raise ImportError('not this one')")
    monkeypatch.syspath_prepend(tmp_path / "ours")
    monkeypatch.chdir(tmp_path / "here")
    with Isolated("measured:length") as isolated:
        assert isolated(b"photo") == {"length": 5}


def parent(body: str) -> subprocess.Popen[str]:
    """Another Python, with a process group of its own, that has an `isolated`."""
    script = f"from fruitray.isolate import Isolated\nisolated = Isolated({ACT!r}, timeout_s=1)\n" + body
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("busy", ["import time; time.sleep(60)", "isolated(b'match')", "isolated(b'long 99999999')"])
def test_a_parent_killed_at_whatever_it_does_leaves_no_child(busy: str) -> None:
    with parent(f"print(isolated(b'about')['pid'], flush=True)\n{busy}") as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        time.sleep(0.2)
        process.kill()
        assert process.communicate()[1] == ""
        wait_for(lambda: has_ended(child))


def test_ctrl_c_is_the_parents_business() -> None:
    """At work, the child's answer is not taken for the next question's; idle, the child lives on. It prints nothing."""
    at_work = "try:\n    isolated(b'sleep 0.9')\nexcept KeyboardInterrupt:\n    print(isolated(b'photo')['size'])\n"
    idle = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print(isolated(b'about')['pid'])\n"
    heeds = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # nohup's children do not
    for body in (at_work, idle):
        with parent(f"{heeds}print(isolated(b'about')['pid'], flush=True)\n{body}") as process:
            assert process.stdout is not None
            child = psutil.Process(int(process.stdout.readline()))
            time.sleep(0.3)
            os.killpg(process.pid, signal.SIGINT)
            assert process.communicate() == ("5\n" if body == at_work else f"{child.pid}\n", "")
            wait_for(functools.partial(has_ended, child))


def test_a_parent_that_blocks_alarms_still_gets_its_timeouts() -> None:
    """Signals that a process ignores or blocks, its children do, too."""
    body = (
        "import signal\n"
        "for alarm in (signal.SIGALRM, signal.SIGPROF):\n"
        "    signal.signal(alarm, signal.SIG_IGN)\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [alarm])\n"
        "print(*isolated.map([b'sleep 40', b'hash']))\n"
    )
    with parent(body) as process:
        found, _ = process.communicate()
    assert found.count("E_TIMEOUT") == 2
