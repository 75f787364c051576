"""The search for leaked secrets finds them."""

import base64
import json
import pickle
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.canaries import leaks

CANARY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


def _parquet(value: str, note: str = "") -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"error": [value] * 100}).replace_schema_metadata({"note": note})
    pq.write_table(table, sink, compression="zstd", store_schema=True)
    found: bytes = sink.getvalue().to_pybytes()
    return found


@pytest.mark.parametrize(
    "data",
    [
        _parquet(f"403 for key {CANARY}"),
        _parquet("fine", f"made with {CANARY}"),
        pickle.dumps({"environment": {"AWS_SECRET_ACCESS_KEY": CANARY}}),
        json.dumps({"url": f"https://store/?key={quote(CANARY, safe='')}"}).encode(),
        *(base64.b64encode(f"{'x' * lead}{CANARY} and so on".encode()) for lead in range(3)),
        base64.urlsafe_b64encode(b"\xff" + CANARY.encode()),
    ],
    ids=["row", "metadata", "pickle", "url", "base64-0", "base64-1", "base64-2", "urlsafe"],
)
def test_a_secret_would_be_found(data: bytes) -> None:
    assert leaks({"here": data, "there": b"nothing"}, {"it": CANARY, "another": "x" * 40}) == ["it in here"]
