"""The one seam to storage: a local folder or an `s3://bucket/prefix` (any endpoint), behaving alike.

    list -> read -> write -> create (write only where nothing is) -> delete

Endpoint and keys come from the standard AWS environment or an instance role. What a photo is, and which files are
photos, is not known here.
"""

import errno
import os
import platform
import re
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from fruitray.errors import (
    AccessDeniedError,
    ChangedError,
    NotFoundError,
    StorageError,
    TryAgainError,
    UsageError,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed object: `key` below the storage's root, verbatim; `size` in bytes; `etag` names this version of it."""

    key: str
    size: int
    etag: str
    kind: str = "file"
    """`file`, `symlink` or `special` (FIFO, device, socket); only a `file` is ever opened."""


def is_hidden(key: str) -> bool:
    """Whether a key names a folder marker, a hidden file or one that a system left, or lies in such a folder."""
    return key.endswith("/") or any(_HIDDEN.match(part) for part in key.split("/"))


_HIDDEN = re.compile(  # in an object store, `.` and `..` are names like others
    r"\.(?!\.?$)|(lost\+found|\$RECYCLE\.BIN|System Volume Information|@eaDir|Thumbs\.db|desktop\.ini)$", re.IGNORECASE
)


class Storage(ABC):
    """A root that holds objects by key. Cheap to make; make one per process, it does not travel between processes."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def uri_of(self, key: str) -> str:
        """The full URI of `key`, verbatim: nothing is escaped."""
        return f"{self.uri}/{key}"

    @abstractmethod
    def check(self) -> None:
        """Raise within seconds if this root cannot be listed: `NotFoundError`, `AccessDeniedError`, `EndpointError`;
        `TryAgainError` where that may pass."""

    def check_again(self) -> None:
        """To be asked where objects that were listed are gone: as `check`, but a folder must not be empty, either, as
        where nothing is mounted."""
        self.check()

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object whose key starts with `prefix`, folders walked through, in no promised order."""

    @abstractmethod
    def folders(self) -> Iterator[str]:
        """The names of the folders directly below the root, hidden ones left out."""

    @abstractmethod
    def stat(self, key: str) -> Entry:
        """What `list` would say of the object at `key`; `NotFoundError` if there is none."""

    @abstractmethod
    def read(self, key: str, etag: str = "") -> bytes:
        """The whole object. With `etag`, `ChangedError` if it is another version by now."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Store `data`, replacing what was there; a reader sees the old or the new, never a part."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Store `data` if nothing is at `key`, else answer False. Atomic where the store can, see `creates_once`."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object at `key`, if there is one."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object at `key`."""

    def sweep(self, prefix: str) -> None:  # noqa: B027
        """Remove what a killed `write` has left below `prefix`, a folder where nobody writes any more: in a bucket
        nothing, as objects appear there when they are complete."""

    def creates_once(self, probe: str) -> bool:
        """Whether `create` is atomic here, found by trying it on the key `probe`, which stays."""
        self.create(probe, b"")
        return not self.create(probe, b"")


def open_storage(uri: str) -> Storage:
    """The storage rooted at a local path, a `file://` URI or an `s3://bucket[/prefix]` URI."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        path = os.path.abspath(os.path.expanduser(unquote(rest) if separator else uri))
        return LocalStorage(path)
    if scheme != "s3":
        raise UsageError(f"{uri!r} is not a place fruitray knows: give a local path or s3://bucket/prefix")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UsageError(f"{uri!r} names no bucket: give s3://bucket/prefix")
    from fruitray.s3 import S3Storage  # on use: boto3 is slow to load, and a folder needs none of it

    return S3Storage(bucket, prefix.removesuffix("/"))


def require_answer(storage: Storage) -> None:
    """Raise within seconds where `storage` does not answer, as reading from it would after minutes."""
    with suppress(AccessDeniedError, NotFoundError):  # nobody asks whether it can be listed
        storage.check()


def open_file(uri: str) -> tuple[Storage, str]:
    """The storage of the folder that holds the single object at `uri`, and the object's key in it."""
    uri = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    folder, separator, name = uri.rstrip("/").rpartition("/")
    return open_storage(f"{folder}/" if separator else "."), name


class LocalStorage(Storage):
    """A folder. New objects appear under their name only when complete (hidden temporary file, then link or rename)."""

    def check(self) -> None:
        with _errors(self.uri):
            os.scandir(self.uri).close()

    def check_again(self) -> None:
        with _errors(self.uri), os.scandir(self.uri) as found:
            if next(found, None) is None:
                raise NotFoundError(self.uri, f"is empty on {platform.node()}: is it not mounted there?")

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        for entry in self._walk(folder):
            if entry.key.startswith(prefix):
                yield entry

    def _walk(self, folder: str) -> Iterator[Entry]:
        path = os.path.join(self.uri, folder)
        hidden = is_hidden(folder)  # as another user's bin, at the root of a disk
        passed_over = (NotFoundError, AccessDeniedError) if hidden else (NotFoundError,)  # the first: deleted meanwhile
        try:
            with _errors(path):
                items = sorted(os.scandir(path), key=lambda item: item.name)
        except passed_over:
            if folder:
                return
            raise
        for item in items:
            try:
                with _errors(item.path):
                    status = item.stat(follow_symlinks=False)
            except passed_over:
                continue
            key = f"{folder}/{item.name}" if folder else item.name
            if stat.S_ISDIR(status.st_mode):
                yield from self._walk(key)
            elif not _TEMPORARY.match(item.name):
                if not is_hidden(key):
                    _require_utf8(self.uri, key)
                yield _entry(_as_text(key), status)

    def folders(self) -> Iterator[str]:
        with _errors(self.uri):
            items = sorted(os.scandir(self.uri), key=lambda item: item.name)
        yield from (item.name for item in items if item.is_dir(follow_symlinks=False) and item.name[0] != ".")

    def stat(self, key: str) -> Entry:
        with _errors(self.uri_of(key)):
            return _entry(key, os.lstat(self.uri_of(key)))

    def read(self, key: str, etag: str = "") -> bytes:
        path = self.uri_of(key)
        with _errors(path), open(path, "rb") as file:
            data = file.read()
            found = _entry(key, os.fstat(file.fileno()))
        if etag and (found.etag != etag or found.size != len(data)):
            raise ChangedError(path, "changed since it was listed")
        return data

    def write(self, key: str, data: bytes) -> None:
        with self._complete_file(key, data) as temporary:
            os.replace(temporary, self.uri_of(key))

    def create(self, key: str, data: bytes) -> bool:
        if os.path.lexists(self.uri_of(key)):
            return False
        with self._complete_file(key, data) as temporary:
            try:
                if _link(temporary, self.uri_of(key)):
                    return True
            except FileExistsError:
                return False
            os.replace(temporary, self.uri_of(key))
        return True

    def creates_once(self, probe: str) -> bool:
        self.create(probe, b"")
        with self._complete_file(probe, b"") as one, self._complete_file(probe, b"") as other:
            os.unlink(other)
            return _link(one, other)

    def delete(self, key: str) -> None:
        with suppress(NotFoundError), _errors(self.uri_of(key)):
            os.unlink(self.uri_of(key))

    def exists(self, key: str) -> bool:
        try:
            with _errors(self.uri_of(key)):
                return stat.S_ISREG(os.stat(self.uri_of(key)).st_mode)
        except NotFoundError:
            return False

    def sweep(self, prefix: str) -> None:
        with suppress(NotFoundError), _errors(self.uri_of(prefix)):
            for name in os.listdir(self.uri_of(prefix)):
                if _TEMPORARY.match(name):
                    Path(self.uri_of(prefix), name).unlink(missing_ok=True)

    @contextmanager
    def _complete_file(self, key: str, data: bytes) -> Iterator[str]:
        """A hidden, synced file beside `key` that holds all of `data`; gone when the context ends."""
        path = Path(self.uri_of(key))
        temporary = path.with_name(f".{uuid.uuid4().hex}.fruitray-tmp")
        with _errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield str(temporary)
            finally:
                temporary.unlink(missing_ok=True)


def _link(path: str, other: str) -> bool:
    """Give a file `other` as a second name, if nothing has it; False where the file system has no hard links, as FAT
    and many a bucket that is mounted as a folder."""
    try:
        os.link(path, other)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True


_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.fruitray-tmp$")


def _entry(key: str, status: os.stat_result) -> Entry:
    kind = "symlink" if stat.S_ISLNK(status.st_mode) else "file" if stat.S_ISREG(status.st_mode) else "special"
    return Entry(key, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}", kind)


def _require_utf8(root: str, key: str) -> None:
    """A key becomes part of a URI in a table, verbatim; Linux allows file names that no text can hold."""
    if (shown := _as_text(key)) != key:
        raise StorageError(f"{root}/{shown}", "has a name that is not UTF-8: rename it")


def _as_text(name: str) -> str:
    """`name`, or where no text can hold it, one like it."""
    return os.fsencode(name).decode(errors="backslashreplace")


_LASTING = (errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


@contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(path, "there is no such file or folder") from error
    except NotADirectoryError as error:
        raise NotFoundError(path, "a file is there, where a folder is needed") from error
    except IsADirectoryError as error:
        raise NotFoundError(path, "a folder is there, where a file is needed") from error
    except ValueError as error:
        raise StorageError(path, "no file can have this name") from error
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise AccessDeniedError(path, reason) from error
        raise (StorageError if error.errno in _LASTING else TryAgainError)(path, reason) from error
