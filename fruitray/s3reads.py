"""Quick reads from a bucket: obstore takes a fraction of the CPU time that boto3 takes for a small object.

It only ever answers whole objects. Whatever else comes, boto3 asks again and finds the words (`s3.py`).
"""

import re
import time
from datetime import timedelta
from typing import Any

import boto3
import obstore
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import PermissionDeniedError, PreconditionError
from obstore.store import S3Store

ATTEMPTS, PAUSE_S = 3, 60.0
"""After so many failures in a row, nothing is tried for so long."""
_PLAIN = re.compile(r"(?!/|.*//)(?!(.*/)?\.{1,2}(/|$))[\w\-./ ()+,=@]+(?<!/)\Z")
"""Keys that obstore takes as they are."""


class QuickReader:
    """Reads whole objects of one bucket, by keys below `root`. Threads may share it. `ValueError`: no credentials."""

    def __init__(self, client: Any, bucket: str, root: str) -> None:
        self._root, self._failures, self._resume = root, 0, 0.0
        self._store = S3Store(
            bucket,
            endpoint=client.meta.endpoint_url,
            region=client.meta.region_name or "us-east-1",
            virtual_hosted_style_request=False,
            # boto3 renews what expires ten minutes before it does, if asked
            credential_provider=Boto3CredentialProvider(boto3.session.Session(), ttl=timedelta(minutes=5)),
            client_options={
                "allow_http": True,
                "connect_timeout": timedelta(seconds=5),
                "read_timeout": timedelta(seconds=10),
                "timeout": timedelta(minutes=10),
            },
            retry_config={"max_retries": 0},
        )

    def read(self, key: str, etag: str) -> bytes | None:
        """The whole object, None if it is not to be had so, for whatever reason."""
        key = self._root + key
        if time.monotonic() < self._resume or not _PLAIN.match(key):
            return None
        try:
            answer = obstore.get(self._store, key, options={"if_match": f'"{etag}"'} if etag else {})
            found, size = (answer.meta["e_tag"] or "").strip('"'), answer.meta["size"]
            data = answer.bytes().to_bytes()
        except (FileNotFoundError, PermissionDeniedError, PreconditionError):
            return None
        except Exception:  # of obstore's own types, and of Python's
            self._failures += 1
            if self._failures >= ATTEMPTS:
                self._failures, self._resume = 0, time.monotonic() + PAUSE_S
            return None
        self._failures = 0
        return data if len(data) == size and found == (etag or found) else None
