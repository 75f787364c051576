"""The one seam to storage: a local folder or an `s3://bucket/prefix` (any endpoint), behaving alike.

    list -> read -> write -> create (write only where nothing is)

Endpoint and keys come from the standard AWS environment or an instance role. What a photo is, and which files are
photos, is not known here.
"""

import errno
import os
import re
import stat
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as HTTPConnectionError

from fruitray.errors import (
    AccessDeniedError,
    ArchivedError,
    ChangedError,
    CredentialsError,
    EndpointError,
    NotFoundError,
    StorageError,
    TryAgainError,
    UsageError,
)

READ_ATTEMPTS = 5
"""How often a body that arrives short or stalls is read again before `TryAgainError`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed object: `key` below the storage's root, verbatim; `size` in bytes; `etag` names this version of it."""

    key: str
    size: int
    etag: str
    kind: str = "file"
    """`file`, `symlink` or `special` (FIFO, device, socket); only a `file` is ever opened."""


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

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object whose key starts with `prefix`, folders walked through, in no promised order."""

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
    def exists(self, key: str) -> bool:
        """Whether there is an object at `key`."""

    def creates_once(self, probe: str) -> bool:
        """Whether `create` is atomic here, found by trying it twice on the key `probe`, which stays."""
        self.create(probe, b"")
        return not self.create(probe, b"")


def open_storage(uri: str) -> Storage:
    """The storage rooted at a local path, a `file://` URI or an `s3://bucket[/prefix]` URI."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        path = os.path.abspath(os.path.expanduser(rest if separator else uri))
        return LocalStorage(path)
    if scheme != "s3":
        raise UsageError(f"{uri!r} is not a place fruitray knows: give a local path or s3://bucket/prefix")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UsageError(f"{uri!r} names no bucket: give s3://bucket/prefix")
    return S3Storage(bucket, prefix.strip("/"))


def open_file(uri: str) -> tuple[Storage, str]:
    """The storage of the folder that holds the single object at `uri`, and the object's key in it."""
    folder, separator, name = uri.rstrip("/").rpartition("/")
    return open_storage((folder or "/") if separator else "."), name


class LocalStorage(Storage):
    """A folder. New objects appear under their name only when complete (hidden temporary file, then link or rename)."""

    def check(self) -> None:
        with _local_errors(self.uri):
            os.scandir(self.uri).close()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        for entry in self._walk(folder):
            if entry.key.startswith(prefix):
                yield entry

    def _walk(self, folder: str) -> Iterator[Entry]:
        path = os.path.join(self.uri, folder)
        if folder and not os.path.isdir(path):
            return
        with _local_errors(path):
            items = sorted(os.scandir(path), key=lambda item: item.name)
        for item in items:
            key = f"{folder}/{item.name}" if folder else item.name
            if item.is_dir(follow_symlinks=False):
                yield from self._walk(key)
            elif not _TEMPORARY.match(item.name):
                _require_utf8(self.uri, key)
                try:
                    status = item.stat(follow_symlinks=False)
                except FileNotFoundError:  # deleted meanwhile
                    continue
                yield _entry(key, status)

    def read(self, key: str, etag: str = "") -> bytes:
        path = self.uri_of(key)
        with _local_errors(path), open(path, "rb") as file:
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
                os.link(temporary, self.uri_of(key))
            except FileExistsError:
                return False
        return True

    def exists(self, key: str) -> bool:
        return os.path.isfile(self.uri_of(key))

    @contextmanager
    def _complete_file(self, key: str, data: bytes) -> Iterator[str]:
        """A hidden, synced file beside `key` that holds all of `data`; gone when the context ends."""
        path = Path(self.uri_of(key))
        temporary = path.with_name(f".{uuid.uuid4().hex}.fruitray-tmp")
        with _local_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield str(temporary)
            finally:
                temporary.unlink(missing_ok=True)


_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.fruitray-tmp$")


def _entry(key: str, status: os.stat_result) -> Entry:
    kind = "symlink" if stat.S_ISLNK(status.st_mode) else "file" if stat.S_ISREG(status.st_mode) else "special"
    return Entry(key, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}", kind)


def _require_utf8(root: str, key: str) -> None:
    """A key becomes part of a URI in a table, verbatim; Linux allows file names that no text can hold."""
    try:
        key.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(key).decode(errors="backslashreplace")
        raise StorageError(f"{root}/{shown}", "has a name that is not UTF-8: rename it") from error


_LASTING = (errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


@contextmanager
def _local_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(path, "there is no such file or folder") from error
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise AccessDeniedError(path, reason) from error
        raise (StorageError if error.errno in _LASTING else TryAgainError)(path, reason) from error


class S3Storage(Storage):
    """A bucket, or a prefix in it."""

    def __init__(self, bucket: str, prefix: str) -> None:
        super().__init__(f"s3://{bucket}/{prefix}".rstrip("/"))
        self._bucket = bucket
        self._root = f"{prefix}/" if prefix else ""
        self._client = _s3_client(read_timeout_s=30, attempts=6)

    def check(self) -> None:
        client = _s3_client(read_timeout_s=5, attempts=2)
        try:
            with _s3_errors(self.uri):
                client.list_objects_v2(Bucket=self._bucket, Prefix=self._root, MaxKeys=1)
        except TryAgainError as error:
            if isinstance(error.__cause__, EndpointConnectionError):
                raise EndpointError(self.uri, error.reason) from error
            raise

    def list(self, prefix: str = "") -> Iterator[Entry]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._root + prefix)
        with _s3_errors(self.uri):
            for page in pages:
                for item in page.get("Contents", ()):
                    if item["Key"] != self._root:  # the marker that some tools leave for the root "folder"
                        yield Entry(item["Key"][len(self._root) :], item["Size"], item["ETag"].strip('"'))

    def read(self, key: str, etag: str = "") -> bytes:
        condition = {"IfMatch": f'"{etag}"'} if etag else {}
        with _s3_errors(self.uri_of(key)):
            for attempt in range(1, READ_ATTEMPTS + 1):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._root + key, **condition)
                if etag and answer["ETag"].strip('"') != etag:  # a store that ignores If-Match
                    raise ChangedError(self.uri_of(key), "changed since it was listed")
                try:
                    data: bytes = answer["Body"].read()
                    return data
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    if attempt == READ_ATTEMPTS:
                        raise
                    time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")

    def write(self, key: str, data: bytes) -> None:
        with _s3_errors(self.uri_of(key)):
            self._client.put_object(Bucket=self._bucket, Key=self._root + key, Body=data)

    def create(self, key: str, data: bytes) -> bool:
        condition = {"IfNoneMatch": "*"}
        with _s3_errors(self.uri_of(key)):
            for attempt in range(1, READ_ATTEMPTS + 1):
                try:
                    self._client.put_object(Bucket=self._bucket, Key=self._root + key, Body=data, **condition)
                    return True
                except ClientError as error:
                    code = error.response["Error"]["Code"]
                    if code in ("PreconditionFailed", "412"):
                        return False
                    if code in ("NotImplemented", "501") and condition:  # a store that knows no such condition
                        condition = {}
                        continue
                    if code != "ConditionalRequestConflict" or attempt == READ_ATTEMPTS:
                        raise
                    time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")

    def exists(self, key: str) -> bool:
        try:
            with _s3_errors(self.uri_of(key)):
                self._client.head_object(Bucket=self._bucket, Key=self._root + key)
        except NotFoundError:
            return False
        return True


def _s3_client(*, read_timeout_s: float, attempts: int) -> Any:
    config = Config(
        connect_timeout=5,
        read_timeout=read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
        request_checksum_calculation="when_required",  # S3-compatible stores refuse the newer trailing checksums
        response_checksum_validation="when_required",
    )
    with _s3_errors("s3://"):
        return boto3.session.Session().client("s3", config=config)


_BAD_KEYS = {
    "InvalidAccessKeyId": "the access key is unknown to this store",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is wrong",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
}


@contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    """Turn what boto3 raises into one of ours, with the sentence a person needs."""
    try:
        yield
    except ClientError as error:
        raise _refusal(uri, error) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        hint = "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
        raise CredentialsError(uri, hint) from error
    except (CredentialRetrievalError, ProfileNotFound, SSOError, TokenRetrievalError) as error:
        raise CredentialsError(uri, _one_line(error)) from error
    except (HTTPClientError, IncompleteReadError, HTTPConnectionError) as error:
        reason = f"no answer from {_endpoint()} ({type(error).__name__})"
        raise (EndpointError if isinstance(error, SSLError) else TryAgainError)(uri, reason) from error
    except BotoCoreError as error:  # what is left is about the request: a bucket name that is none, ...
        raise StorageError(uri, _one_line(error)) from error
    except ValueError as error:  # botocore's word for an endpoint URL that is none
        raise EndpointError(uri, _one_line(error)) from error


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _refusal(uri: str, error: ClientError) -> StorageError | TryAgainError:
    code = error.response["Error"]["Code"]
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    if code == "NoSuchBucket":
        return NotFoundError(uri, "there is no such bucket")
    if code == "NoSuchKey":
        return NotFoundError(uri, "there is no such object")
    if status == 404:
        return NotFoundError(uri, f"{_endpoint()} answers {code}")
    if code in ("PreconditionFailed", "412"):
        return ChangedError(uri, "changed since it was listed")
    if code == "InvalidObjectState":
        return ArchivedError(uri, "lies in an archive tier")
    if code in _BAD_KEYS:
        return CredentialsError(uri, _BAD_KEYS[code])
    if status == 403:
        return AccessDeniedError(uri, "access denied")
    if (status >= 500 and status != 501) or code in ("SlowDown", "RequestTimeout", "Throttling"):
        return TryAgainError(uri, f"{_endpoint()} answers {code}")
    return StorageError(uri, f"{_endpoint()} answers {code}")
