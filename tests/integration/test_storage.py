"""A local folder and an S3 bucket behave alike; whatever storage does, we get an answer or the right error, soon."""

import errno
import os
import resource
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

import pytest

from fruitray import s3 as s3_module
from fruitray.cli import run_job
from fruitray.errors import (
    AccessDeniedError,
    ArchivedError,
    ChangedError,
    CredentialsError,
    EndpointError,
    FruitrayError,
    NotFoundError,
    StorageError,
    TryAgainError,
    UsageError,
)
from fruitray.s3server import free_ports
from fruitray.storage import LocalStorage, Storage, open_file, open_storage
from tests.trouble import serving

pytestmark = pytest.mark.timeout(120)

# Not here, as SeaweedFS is not S3 there: `a//b` and `a\b` become `a/b`.
ODD_KEYS = [
    "a b.jpg",
    " ends .jpg",
    "äpfel/桃🍎.jpg",
    "it's.jpg",
    '"quoted".jpg',
    "a\tb.jpg",
    "a\nb.jpg",
    "100%.jpg",
    "a%20b.jpg",
    "a+b&c=d?e#f.jpg",
    "*.jpg",
    "..jpg",
    ".hidden",
    "deep/er/and/deeper.jpg",
]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty folder, or an empty prefix of a bucket."""
    if request.param == "local":
        (tmp_path / "root").mkdir()
        return open_storage(str(tmp_path / "root"))
    return open_storage(f"s3://{request.getfixturevalue('aws')}/ro ot")


@pytest.fixture
def local(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


def keys(storage: Storage, prefix: str = "") -> list[str]:
    return sorted(entry.key for entry in storage.list(prefix))


def no_leftovers(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if "fruitray-tmp" in path.name]


# ---- Alike


def test_a_large_object_is_sent_in_parts_and_read_whole(aws: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here 11 MiB are large; S3 takes no part below 5."""
    monkeypatch.setattr("fruitray.s3.AT_ONCE", 6 << 20)
    monkeypatch.setattr("fruitray.s3.PART", 5 << 20)
    place, data = open_storage(f"s3://{aws}/ro ot"), os.urandom(11 << 20)
    place.write("a/b.bin", data)
    assert place.read("a/b.bin") == data
    assert place.stat("a/b.bin").etag.endswith("-3"), "in three parts"


@pytest.mark.parametrize("data", [b"", b"x", os.urandom(3_000_000)], ids=["empty", "a byte", "3 MB"])
def test_what_is_written_is_read(place: Storage, data: bytes) -> None:
    place.write("a/b.bin", data)
    assert place.read("a/b.bin") == data
    [entry] = place.list()
    assert (entry.key, entry.size, entry.kind) == ("a/b.bin", len(data), "file")
    assert place.read("a/b.bin", entry.etag) == data


def test_odd_keys_come_back_verbatim(place: Storage) -> None:
    for key in ODD_KEYS:
        place.write(key, key.encode())
    assert keys(place) == sorted(ODD_KEYS)
    assert {entry.key: place.read(entry.key, entry.etag) for entry in place.list()} == {
        key: key.encode() for key in ODD_KEYS
    }
    assert all(place.exists(key) and place.uri_of(key) == f"{place.uri}/{key}" for key in ODD_KEYS)


def test_more_keys_than_one_page_are_all_listed(place: Storage) -> None:
    wanted = [f"many/{number:04d}" for number in range(1_050)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: place.write(key, b"."), wanted))
    assert keys(place, "many/") == wanted


def test_a_listing_keeps_to_its_prefix(place: Storage) -> None:
    for key in ("data/1", "data/deep/2", "data2/3", "dat", "other"):
        place.write(key, b".")
    assert keys(place, "data/") == ["data/1", "data/deep/2"]
    assert keys(place, "data") == ["data/1", "data/deep/2", "data2/3"]
    assert keys(place, "data/de") == ["data/deep/2"]
    assert keys(place, "nothing/") == keys(place, "nothing") == []
    assert len(keys(place)) == 5


def test_a_root_does_not_see_its_neighbours(place: Storage) -> None:
    place.write("inside", b".")
    open_storage(f"{place.uri}-too").write("outside", b".")
    assert keys(place) == ["inside"]
    assert keys(open_storage(f"{place.uri}/")) == ["inside"]


def test_a_replaced_object_is_another_version(place: Storage) -> None:
    place.write("a", b"old")
    [entry] = place.list()
    place.write("a", b"new content")
    with pytest.raises(ChangedError, match="changed"):
        place.read("a", entry.etag)
    assert place.read("a") == b"new content"


def test_what_is_not_there_is_not_found(place: Storage) -> None:
    assert not place.exists("a")
    for etag in ("", "0123456789abcdef0123456789abcdef"):
        with pytest.raises(NotFoundError) as caught:
            place.read("a", etag)
        assert f"{place.uri}/a" in str(caught.value)


def test_a_place_that_is_there_passes_the_check(place: Storage) -> None:
    place.check()


def test_create_writes_only_where_nothing_is(place: Storage) -> None:
    assert place.create("deep/a", b"first")
    assert not place.create("deep/a", b"second")
    assert place.read("deep/a") == b"first"
    assert place.exists("deep/a")


def test_of_many_that_create_at_once_one_wins(place: Storage) -> None:
    barrier = threading.Barrier(6)  # few, as SeaweedFS lets the losers wait for seconds

    def create(number: int) -> bool:
        barrier.wait()
        return place.create("race", f"{number}".encode() * 1_000)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(create, range(6)))
    assert won.count(True) == 1
    assert place.read("race") == f"{won.index(True)}".encode() * 1_000
    assert keys(place) == ["race"]


def test_a_reader_sees_the_old_or_the_new_never_a_part(place: Storage) -> None:
    size, done = 300_000, threading.Event()
    place.write("a", b"0" * size)

    def rewrite() -> None:
        for number in range(1, 30):
            place.write("a", str(number % 10).encode() * size)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(rewrite)
        seen = set()
        while not done.is_set() and not writer.done():
            data = place.read("a")
            assert len(data) == size
            assert len(set(data)) == 1
            seen.add(data[:1])
        writer.result()
    assert len(seen) > 1


def test_it_is_found_out_that_create_is_atomic(place: Storage) -> None:
    assert place.creates_once("probe")
    assert place.creates_once("probe")  # also where the probe lies already
    assert keys(place) == ["probe"]


def test_without_hard_links_what_is_created_is_whole_and_the_weakness_is_found_out(
    local: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on FAT, or on a bucket that is mounted as a folder."""

    def link(path: str, other: str) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path, None, other)

    monkeypatch.setattr(os, "link", link)
    assert local.create("deep/a", b"first")
    assert not local.create("deep/a", b"second")
    assert local.read("deep/a") == b"first"
    assert not local.creates_once("probe")
    assert no_leftovers(tmp_path)


def test_a_store_that_ignores_the_condition_is_found_out(weak_aws: str) -> None:
    weak = open_storage(f"s3://{weak_aws}/out")
    assert not weak.creates_once("probe")
    assert not weak.creates_once("probe")
    weak.write("a", b"data")
    [entry] = weak.list("a")
    assert weak.read("a", entry.etag) == b"data"
    weak.write("a", b"other")
    with pytest.raises(ChangedError):
        weak.read("a", entry.etag)


# ---- URIs


@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("/tmp/photos", "/tmp/photos"),
        ("/tmp/photos/", "/tmp/photos"),
        ("/tmp/a/../photos", "/tmp/photos"),
        ("file:///tmp/photos", "/tmp/photos"),
        ("file:///tmp/my%20photos", "/tmp/my photos"),
        ("/tmp/my%20photos", "/tmp/my%20photos"),
        ("photos", f"{os.getcwd()}/photos"),
        ("~/photos", os.path.expanduser("~/photos")),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket//a", "s3://bucket//a"),
        ("s3://bucket/a//", "s3://bucket/a/"),
    ],
)
def test_a_uri_leads_to_its_root(uri: str, root: str) -> None:
    assert open_storage(uri).uri == root


@pytest.mark.parametrize("uri", ["gs://bucket/photos", "http://host/photos", "s3://", "s3:///photos"])
def test_a_uri_that_leads_nowhere_is_wrong_usage(uri: str) -> None:
    with pytest.raises(UsageError, match="s3://bucket/prefix") as caught:
        open_storage(uri)
    assert uri in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("/tmp/a/index.parquet", "/tmp/a/index.parquet"),
        ("/index.parquet", "//index.parquet"),
        ("index.parquet", f"{os.getcwd()}/index.parquet"),
        ("s3://bucket/index.parquet", "s3://bucket/index.parquet"),
        ("s3://bucket/a/index.parquet", "s3://bucket/a/index.parquet"),
        ("s3://bucket/a//index.parquet", "s3://bucket/a//index.parquet"),
        ("file:///tmp/my%20a/index.parquet", "/tmp/my a/index.parquet"),
    ],
)
def test_a_file_is_found_in_its_folder(uri: str, found: str) -> None:
    storage, key = open_file(uri)
    assert key == "index.parquet"
    assert storage.uri_of(key) == found


# ---- Local folders


def test_links_and_pipes_are_listed_with_their_kind_and_never_opened(local: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b".")
    (tmp_path / "folder link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "broken link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        kinds = {entry.key: entry.kind for entry in local.list()}
    assert kinds == {
        "real/a.jpg": "file",
        "real/loop": "symlink",
        "folder link": "symlink",
        "broken link": "symlink",
        "pipe": "special",
        "socket": "special",
    }


def test_a_file_deleted_while_its_folder_is_listed_is_not_listed(local: LocalStorage, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b".")
    listing = local.list()
    first = next(listing)
    (tmp_path / "b").unlink()
    assert [first.key, *(entry.key for entry in listing)] == ["a", "c"]


def test_a_name_that_is_no_text_is_named(local: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"fr\xfcit.jpg")).write_bytes(b".")
    with pytest.raises(StorageError, match=r"fr\\xfcit\.jpg.*UTF-8") as caught:
        list(local.list())
    str(caught.value).encode()


def test_a_hidden_name_that_is_no_text_is_shown_as_one_like_it(local: LocalStorage, tmp_path: Path) -> None:
    for name in (b".fr\xfcit.jpg", b".Trash/fr\xfcit.jpg"):
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b".")
    assert [entry.key for entry in local.list()] == [".Trash/fr\\xfcit.jpg", ".fr\\xfcit.jpg"]


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b".")
    for name in ("missing", "file"):
        storage = open_storage(str(tmp_path / name))
        with pytest.raises(NotFoundError, match=name):
            storage.check()
        with pytest.raises(NotFoundError, match=name):
            list(storage.list())


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder of one's own, as a user whom permissions bind, which root is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def test_what_permissions_forbid_is_access_denied() -> None:
    with unprivileged() as folder:
        (folder / "closed").mkdir(0o000)
        (folder / "secret").touch(0o000)
        (folder / "frozen").mkdir(0o555)
        for attempt in (
            lambda: open_storage(f"{folder}/closed").check(),
            lambda: list(open_storage(str(folder)).list()),
            lambda: open_storage(str(folder)).read("secret"),
            lambda: open_storage(f"{folder}/frozen").write("a", b"."),
            lambda: open_storage(f"{folder}/frozen").create("deep/a", b"."),
        ):
            with pytest.raises(AccessDeniedError, match="Permission denied"):
                attempt()
        (folder / "closed").chmod(0o755)


def test_whether_a_file_is_there_is_not_answered_by_who_cannot_know() -> None:
    with unprivileged() as folder:
        (folder / "closed").mkdir()
        (folder / "closed" / "a").touch()
        (folder / "closed").chmod(0o000)
        with pytest.raises(AccessDeniedError, match="Permission denied"):
            open_storage(str(folder)).exists("closed/a")
        (folder / "closed").chmod(0o755)
        assert open_storage(str(folder)).exists("closed/a")
        assert not open_storage(str(folder)).exists("closed/b")
        assert not open_storage(str(folder)).exists("closed/a/b")


def test_a_folder_that_cannot_be_looked_into_is_not_passed_over_unless_hidden() -> None:
    """Its names can be read (r), what lies there cannot (no x)."""
    with unprivileged() as folder:
        for name in ("apple/2020", "pear", ".Trash-1000", ".Trash-1001/files", ".Trash-1002", "lost+found"):
            (folder / name).mkdir(parents=True)
            (folder / name / "1.jpg").touch()
        closed = ((".Trash-1000", 0o000), (".Trash-1001/files", 0o000), (".Trash-1002", 0o644), ("lost+found", 0o000))
        for name, mode in closed:
            (folder / name).chmod(mode)
        assert keys(open_storage(str(folder))) == ["apple/2020/1.jpg", "pear/1.jpg"]
        (folder / "apple").chmod(0o644)
        with pytest.raises(AccessDeniedError, match="apple"):
            list(open_storage(str(folder)).list())
        for name in ("apple", *(name for name, _ in closed)):
            (folder / name).chmod(0o755)


def test_a_write_that_fails_half_way_leaves_nothing_behind(local: LocalStorage, tmp_path: Path) -> None:
    local.write("a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for attempt in (local.write, local.create):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # stands for a full disk
        try:
            with pytest.raises(TryAgainError):
                attempt("a" if attempt == local.write else "b", bytes(2_000_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert keys(local) == ["a"]
    assert local.read("a") == b"old"
    assert no_leftovers(tmp_path)


@pytest.mark.parametrize("key", ["folder", "file/below", "n" * 300])
def test_a_place_that_cannot_be_written_to_is_no_passing_fault(local: LocalStorage, tmp_path: Path, key: str) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b".")
    with pytest.raises(StorageError):
        local.write(key, b"new")
    assert no_leftovers(tmp_path)


def test_a_race_of_creates_leaves_no_temporary_files(local: LocalStorage, tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda number: local.create(f"deep/{number % 4}", b"."), range(64)))
    assert won.count(True) == 4
    assert no_leftovers(tmp_path)


# ---- An S3 store that says no


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def test_a_missing_bucket_is_not_found(aws: str) -> None:
    storage = open_storage(f"s3://{aws}-none/photos")
    with within(30), pytest.raises(NotFoundError, match=f"{aws}-none.*no such bucket"):
        storage.check()
    with pytest.raises(NotFoundError, match="no such bucket"):
        list(storage.list())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "secret key is wrong"),
        ("AWS_ACCESS_KEY_ID", "NOBODY", "access key is unknown"),
        ("AWS_PROFILE", "nobody", "nobody"),
    ],
)
def test_wrong_keys_are_told_as_such(
    aws: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with within(30), pytest.raises(CredentialsError, match=said) as caught:
        open_storage(f"s3://{aws}").check()
    assert secrets_are_kept(caught.value)


def secrets_are_kept(error: FruitrayError) -> bool:
    return os.environ["AWS_SECRET_ACCESS_KEY"] not in str(error).replace("secret key is wrong", "")


def test_missing_keys_are_told_as_such(aws: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with within(30), pytest.raises(CredentialsError, match="AWS_ACCESS_KEY_ID"):
        open_storage(f"s3://{aws}").check()


def test_a_bucket_name_that_is_none_is_told_in_one_line(aws: str) -> None:
    with pytest.raises(StorageError, match="not a bucket") as caught:
        open_storage("s3://not a bucket/photos").check()
    assert "\n" not in str(caught.value)


# ---- A store that misbehaves: a server that answers what the test says


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    """Close the connection after half of the body."""


def refusal(status: int, code: str) -> Reply:
    return Reply(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())


Stubborn = Callable[..., list[tuple[str, dict[str, str]]]]


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubborn]:
    """Lead AWS to a server that gives the replies in turn, then the last one for ever; returns what it was asked."""

    def start(*replies: Reply) -> list[tuple[str, dict[str, str]]]:
        asked: list[tuple[str, dict[str, str]]] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                reply = replies[min(len(asked), len(replies) - 1)]
                asked.append((self.command, {":path": self.path, **self.headers}))
                self.send_response(reply.status)
                for name, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body[: len(reply.body) // 2] if reply.cut else reply.body)
                self.close_connection = reply.cut

            do_GET = do_PUT = do_HEAD = do_POST = answer  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        lead_to(servers.enter_context(serving(Handler)), monkeypatch)
        return asked

    with ExitStack() as servers:
        yield start


def lead_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)


OBJECT = Reply(body=b"all of the photo", headers={"ETag": '"v1"'})
CUT = Reply(body=OBJECT.body, headers=OBJECT.headers, cut=True)


def test_a_body_that_comes_short_is_read_again(stubborn: Stubborn) -> None:
    asked = stubborn(CUT, CUT, OBJECT)
    assert open_storage("s3://fruit").read("a", "v1") == OBJECT.body
    conditions = [{name.lower(): value for name, value in headers.items()}["if-match"] for _, headers in asked]
    assert conditions == ['"v1"'] * 3


def test_a_body_that_always_comes_short_is_a_passing_fault(stubborn: Stubborn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "READ_ATTEMPTS", 2)
    asked = stubborn(CUT)
    with pytest.raises(TryAgainError, match="s3://fruit/a"):
        open_storage("s3://fruit").read("a")
    assert len(asked) == 1 + 2  # obstore, then boto3 again and again


@pytest.mark.parametrize("key", ["/a", "a//b", "a/../b", "a/./b", "a/", "a b/c+d=e.jpg"])
def test_an_object_is_asked_for_by_its_own_name(stubborn: Stubborn, key: str) -> None:
    asked = stubborn(OBJECT)
    assert open_storage("s3://fruit").read(key) == OBJECT.body
    assert [unquote(headers[":path"]) for _, headers in asked] == [f"/fruit/{key}"]


def test_an_overloaded_store_is_asked_again(stubborn: Stubborn) -> None:
    stubborn(refusal(503, "SlowDown"), refusal(500, "InternalError"), OBJECT)
    assert open_storage("s3://fruit").read("a") == OBJECT.body


def test_another_version_is_noticed_where_the_store_ignores_the_condition(stubborn: Stubborn) -> None:
    stubborn(OBJECT)
    with pytest.raises(ChangedError):
        open_storage("s3://fruit").read("a", "v0")


REFUSALS = [
    (404, "NoSuchKey", NotFoundError),
    (404, "NoSuchBucket", EndpointError),
    (401, "Unauthorized", CredentialsError),
    (400, "TokenRefreshRequired", CredentialsError),
    (403, "AccountProblem", CredentialsError),
    (412, "PreconditionFailed", ChangedError),
    (403, "AccessDenied", AccessDeniedError),
    (403, "AllAccessDisabled", AccessDeniedError),
    (403, "InvalidObjectState", ArchivedError),
    (400, "ExpiredToken", CredentialsError),
    (403, "InvalidTokenId", CredentialsError),
    (403, "RequestTimeTooSkewed", CredentialsError),
    (400, "InvalidRequest", StorageError),
    (501, "NotImplemented", StorageError),
]


@pytest.mark.parametrize(("status", "code", "error"), REFUSALS, ids=[code for _, code, _ in REFUSALS])
def test_each_refusal_becomes_its_error_at_once(
    stubborn: Stubborn, status: int, code: str, error: type[FruitrayError]
) -> None:
    asked = stubborn(refusal(status, code))
    with pytest.raises(FruitrayError) as caught:
        open_storage("s3://fruit").read("a")
    assert type(caught.value) is error
    assert "s3://fruit/a" in str(caught.value)
    assert len(asked) == 2  # obstore once, and boto3 once for the words


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "ExpiredTokenException", CredentialsError),
        (403, "AccessDenied", CredentialsError),
        (400, "IDPCommunicationError", TryAgainError),
    ],
)
def test_who_gets_no_keys_for_its_role_is_not_told_that_an_object_is_refused(
    stubborn: Stubborn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, error: type[Exception]
) -> None:
    stubborn(Reply(status, b"<ErrorResponse>" + refusal(status, code).body + b"</ErrorResponse>"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text("a token")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/fruitray")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    with within(30), pytest.raises(error, match=code):
        open_storage("s3://fruit").read("a")


def test_a_store_that_stays_overloaded_is_a_passing_fault(stubborn: Stubborn) -> None:
    stubborn(refusal(503, "SlowDown"))
    with within(30), pytest.raises(TryAgainError):
        open_storage("s3://fruit").check()


@pytest.mark.parametrize(("status", "error"), [(200, TryAgainError), (404, NotFoundError), (405, StorageError)])
def test_an_endpoint_that_is_no_s3_is_named(stubborn: Stubborn, status: int, error: type[FruitrayError]) -> None:
    stubborn(Reply(status, b"<!DOCTYPE html><html><p>Dashboard</html>"))
    with within(30), pytest.raises(error, match=os.environ["AWS_ENDPOINT_URL"]):
        open_storage("s3://fruit").check()


def test_a_create_that_met_another_is_tried_again(stubborn: Stubborn) -> None:
    asked = stubborn(refusal(409, "ConditionalRequestConflict"), Reply(200))
    assert open_storage("s3://fruit").create("a", b"data")
    assert [(method, headers["If-None-Match"]) for method, headers in asked] == [("PUT", "*")] * 2


def test_a_create_whose_answer_was_lost_finds_its_own_object(stubborn: Stubborn) -> None:
    stubborn(refusal(500, "InternalError"), refusal(412, "PreconditionFailed"))
    assert not open_storage("s3://fruit").create("a", b"data")


def test_a_store_that_knows_no_conditions_counts_as_weak(stubborn: Stubborn) -> None:
    refused = refusal(501, "NotImplemented")
    asked = stubborn(refused, Reply(200), refused, Reply(200))
    assert not open_storage("s3://fruit").creates_once("probe")
    assert ["If-None-Match" in headers for _, headers in asked] == [True, False, True, False]


def test_an_endpoint_that_is_down_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    lead_to(endpoint, monkeypatch)
    with within(30), pytest.raises(EndpointError, match=endpoint):
        open_storage("s3://fruit").check()


def test_an_endpoint_that_no_name_server_knows_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    lead_to("http://s3.fruit.invalid", monkeypatch)
    with within(30), pytest.raises(EndpointError, match=r"s3\.fruit\.invalid"):
        open_storage("s3://fruit").check()


def test_an_endpoint_that_is_no_url_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lead_to("fruit", monkeypatch)
    with within(5), pytest.raises(EndpointError, match="fruit; AWS_ENDPOINT_URL must be a URL"):
        open_storage("s3://fruit").check()


def test_a_server_that_never_answers_is_a_passing_fault_told_within_30_s(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        lead_to(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        with within(30), pytest.raises(TryAgainError, match="no answer from"):
            open_storage("s3://fruit").check()
        for options in (("--index", "s3://fruit/index"), ("--index", "i", "--config", "s3://fruit/tune/best.json")):
            with within(30):
                assert run_job("train", [*options, "--out", "nowhere"]) == 75
