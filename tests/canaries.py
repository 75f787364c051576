"""Whether a secret is in what a run leaves behind, in clear or thinly wrapped."""

import base64
import math
from collections.abc import Mapping
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq


def leaks(places: Mapping[str, bytes], canaries: Mapping[str, str]) -> list[str]:
    """Which canary is in which place."""
    forms = {name: _forms(canary) for name, canary in canaries.items()}
    texts = ((place, _clear(data)) for place, data in places.items())
    return [
        f"{name} in {place}" for place, text in texts for name in forms if any(form in text for form in forms[name])
    ]


def _forms(canary: str) -> set[bytes]:
    """As it is, in a URL, and in base64, wherever in the encoded text it begins."""
    plain = canary.encode()
    forms = {plain, quote(canary, safe="").encode()}
    for lead in range(3):
        whole = slice(
            math.ceil(lead * 8 / 6), (lead + len(plain)) * 8 // 6
        )  # letters that its neighbours have no part in
        encoded = base64.b64encode(bytes(lead) + plain + bytes(2))[whole]
        forms |= {encoded, encoded.replace(b"+", b"-").replace(b"/", b"_")}
    return forms


def _clear(data: bytes) -> bytes:
    """With the rows and the metadata of a Parquet file uncompressed behind it."""
    if not data.startswith(b"PAR1"):
        return data
    table, sink = pq.read_table(pa.BufferReader(data)), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    rows: bytes = sink.getvalue().to_pybytes()
    return data + rows
