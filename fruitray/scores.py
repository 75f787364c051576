"""The table of scores: its columns, and how it is made of inputs and predictions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from fruitray.inputs import uris
from fruitray.tables import field

if TYPE_CHECKING:
    from fruitray.predictor import Prediction  # it brings torch, which `verify` can do without

SCHEMA = pa.schema(
    [
        field("uri", pa.string(), "where the photo lies, verbatim"),
        field("label", pa.string(), "the most likely class"),
        field("confidence", pa.float32(), "calibrated softmax share of `label`"),
        field("top_labels", pa.list_(pa.string()), "the most likely first, as many as --top-k says"),
        field("top_scores", pa.list_(pa.float32()), "their calibrated softmax shares"),
        field("status", pa.string(), "ok, or error"),
        field("error_code", pa.string(), "one of fruitray.images.CODES"),
        field("error", pa.string(), "what error_code means, and what is known of this file"),
        field("width", pa.int32(), "pixels, after EXIF rotation"),
        field("height", pa.int32(), "pixels, after EXIF rotation"),
        field("etag", pa.string(), "the storage's name for the version that was scored"),
        field("model_id", pa.string(), "SHA-256 of the model package's package.json"),
    ]
)
EMBEDDING = field("embedding", pa.list_(pa.float32()), "what the network's head saw of the photo")


def schema(*, embeddings: bool) -> pa.Schema:
    """The columns of a table of scores."""
    return SCHEMA.append(EMBEDDING) if embeddings else SCHEMA


def score_rows(
    inputs: pa.Table, predictions: "Sequence[Prediction]", model_id: str, *, embeddings: bool = False
) -> pa.Table:
    """One row per input (`fruitray.inputs.INPUTS`), as `SCHEMA`, with `EMBEDDING` if wanted."""
    columns = schema(embeddings=embeddings)
    given = {"uri": uris(inputs), "etag": inputs["etag"], "model_id": [model_id] * inputs.num_rows}
    said = {name: [getattr(one, name) for one in predictions] for name in columns.names if name not in given}
    return pa.table(given | said, columns)
