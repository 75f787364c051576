"""Storage in a bucket: calls to boto3, and what it raises as errors of ours, with the sentence a person needs."""

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import boto3
import botocore.exceptions
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.configprovider import ConfiguredEndpointProvider
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
from botocore.loaders import create_loader
from botocore.session import get_session

from fruitray.errors import (
    AccessDeniedError,
    ArchivedError,
    ChangedError,
    CredentialsError,
    EndpointError,
    NotFoundError,
    StorageError,
    TryAgainError,
    one_line,
)
from fruitray.s3reads import QuickReader
from fruitray.storage import Entry, Storage

READ_ATTEMPTS = 5
"""How often a body that arrives short or stalls is read again before `TryAgainError`."""
AT_ONCE, PART = 1 << 30, 1 << 27
"""Bytes beyond which an object is sent in parts, as S3 takes no more than five times that in one; and of each part."""


class S3Storage(Storage):
    """A bucket, or a prefix in it."""

    def __init__(self, bucket: str, prefix: str) -> None:
        super().__init__(f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}")
        self._bucket = bucket
        self._root = f"{prefix}/" if prefix else ""
        self._client = _client(read_timeout_s=30, attempts=6)

    def check(self) -> None:
        client = _client(read_timeout_s=5, attempts=2)
        try:
            with _errors(self.uri):
                client.list_objects_v2(Bucket=self._bucket, Prefix=self._root, MaxKeys=1)
        except TryAgainError as error:
            if isinstance(error.__cause__, EndpointConnectionError):
                raise EndpointError(self.uri, error.reason) from error
            raise

    def list(self, prefix: str = "") -> Iterator[Entry]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._root + prefix)
        with _errors(self.uri):
            for page in pages:
                for item in page.get("Contents", ()):
                    if item["Key"] != self._root:  # the marker that some tools leave for the root "folder"
                        yield Entry(item["Key"][len(self._root) :], item["Size"], item["ETag"].strip('"'))

    def folders(self) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._root, Delimiter="/"
        )
        with _errors(self.uri):
            for page in pages:
                names = (item["Prefix"][len(self._root) : -1] for item in page.get("CommonPrefixes", ()))
                yield from (name for name in names if name and name[0] != ".")

    def stat(self, key: str) -> Entry:
        with _errors(self.uri_of(key)):
            answer = self._client.head_object(Bucket=self._bucket, Key=self._root + key)
        return Entry(key, answer["ContentLength"], answer.get("ETag", "").strip('"'))

    @cached_property
    def _quick(self) -> QuickReader | None:
        with suppress(ValueError, BotoCoreError):  # no credentials: boto3 has the words for it
            return QuickReader(self._client, self._bucket, self._root)
        return None

    def read(self, key: str, etag: str = "") -> bytes:
        if self._quick and (found := self._quick.read(key, etag)) is not None:
            return found
        condition = {"IfMatch": f'"{etag}"'} if etag else {}
        with _only_objects_are_missing(), _errors(self.uri_of(key)):
            for attempt in range(1, READ_ATTEMPTS + 1):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._root + key, **condition)
                if etag and answer.get("ETag", "").strip('"') != etag:  # a store that ignores If-Match
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
        where = {"Bucket": self._bucket, "Key": self._root + key}
        with _errors(self.uri_of(key)):
            if len(data) > AT_ONCE:
                in_parts = TransferConfig(multipart_threshold=AT_ONCE, multipart_chunksize=PART)
                self._client.upload_fileobj(io.BytesIO(data), **where, Config=in_parts)
            else:
                self._client.put_object(**where, Body=data)

    def create(self, key: str, data: bytes) -> bool:
        condition = {"IfNoneMatch": "*"}
        with _errors(self.uri_of(key)):
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

    def delete(self, key: str) -> None:
        with _errors(self.uri_of(key)):
            self._client.delete_object(Bucket=self._bucket, Key=self._root + key)

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except NotFoundError:
            return False
        return True


def _client(*, read_timeout_s: float, attempts: int) -> Any:
    config = Config(
        connect_timeout=5,
        read_timeout=read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
        request_checksum_calculation="when_required",  # S3-compatible stores refuse the newer trailing checksums
        response_checksum_validation="when_required",
    )
    with _errors("s3://"):
        session = get_session()
        session.register_component("data_loader", _LOADER)
        return boto3.session.Session(botocore_session=session).client("s3", config=config)


_LOADER = create_loader()
"""Keeps botocore's description of S3, which each client would read anew: most of the time that making one takes."""


_LoginError: Any = getattr(botocore.exceptions, "LoginError", SSOError)  # of `aws login`, which older botocore lacks
_BAD_KEYS = {
    "InvalidAccessKeyId": "the access key is unknown to this store",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is wrong",
    "InvalidTokenId": "the session token is wrong, or has expired",  # MinIO
    "TokenRefreshRequired": "the session token has expired",
    "AuthorizationHeaderMalformed": "the region is wrong, or the key",
    "AccountProblem": "the account has a problem",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
}


_PASSING = (408, 409, 425, 429)
"""Took too long, met another's write, too early, too many."""


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turn what boto3 raises into one of ours, with the sentence a person needs."""
    try:
        yield
    except ClientError as error:
        raise _refusal(uri, error) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        hint = "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
        raise CredentialsError(uri, hint) from error
    except (CredentialRetrievalError, _LoginError, ProfileNotFound, SSOError, TokenRetrievalError) as error:
        raise CredentialsError(uri, one_line(error)) from error
    except (HTTPClientError, IncompleteReadError, HTTPConnectionError) as error:
        reason = f"no answer from {endpoint()} ({type(error).__name__}); does it run, is AWS_ENDPOINT_URL right?"
        raise (EndpointError if isinstance(error, SSLError) else TryAgainError)(uri, reason) from error
    except BotoCoreError as error:  # what is left is about the request: a bucket name that is none, ...
        raise StorageError(uri, one_line(error)) from error
    except ValueError as error:  # botocore's word for an endpoint URL that is none
        hint = "AWS_ENDPOINT_URL must be a URL such as http://127.0.0.1:8333"
        raise EndpointError(uri, f"{one_line(error)}; {hint}") from error


@contextmanager
def _only_objects_are_missing() -> Iterator[None]:
    """That a bucket is not there, or that something else answers, says nothing of the object that was asked for."""
    try:
        yield
    except NotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, ClientError) and cause.response["Error"]["Code"] not in ("NoSuchKey", "NoSuchVersion"):
            raise EndpointError(error.uri, error.reason) from cause
        raise


def endpoint(*, configured: bool = True) -> str:
    """Where requests go, as the environment says, and `~/.aws/config` where it is `configured` there."""
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not named and configured:
        session = get_session()
        with suppress(BotoCoreError):  # of a profile that is not there
            scope, whole = session.get_scoped_config(), session.full_config
            named = ConfiguredEndpointProvider(whole, scope, "s3").provide()
    return named or "AWS"


def _refusal(uri: str, error: ClientError) -> StorageError | TryAgainError:
    code = error.response["Error"]["Code"]
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    if error.operation_name.startswith(("AssumeRole", "GetRoleCredentials")):  # of STS or SSO: no object was asked for
        passing = status >= 500 or status in _PASSING or code in ("Throttling", "IDPCommunicationError")
        return (TryAgainError if passing else CredentialsError)(uri, one_line(error))
    if code == "NoSuchBucket":
        return NotFoundError(uri, "there is no such bucket; make it first, or see its name")
    if code == "NoSuchKey":
        return NotFoundError(uri, "there is no such object")
    if status == 404:
        return NotFoundError(uri, f"{endpoint()} answers {code}")
    if code in ("PreconditionFailed", "412"):
        return ChangedError(uri, "changed since it was listed")
    if code == "InvalidObjectState":
        return ArchivedError(uri, "lies in an archive tier")
    if code in _BAD_KEYS:
        return CredentialsError(uri, _BAD_KEYS[code])
    if status == 401:
        return CredentialsError(uri, f"{endpoint()} does not know who asks")
    if status == 403:
        return AccessDeniedError(uri, "access denied")
    if (status >= 500 and status != 501) or status in _PASSING or code in ("SlowDown", "RequestTimeout", "Throttling"):
        return TryAgainError(uri, f"{endpoint()} answers {code}")
    return StorageError(uri, f"{endpoint()} answers {code}")
