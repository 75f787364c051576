"""fruitray: from a bucket of labelled photos to a scored Parquet table.

photos in storage -> index -> split -> batches | features -> fit -> model package -> predictor -> scores (Parquet)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fruitray.predictor import Predictor

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def load(uri: str) -> "Predictor":
    """The model package at `uri`, a local path or s3:// prefix, ready to use.

    >>> import fruitray as fr
    >>> model = fr.load("runs/model")
    >>> good, bad = model.predict([open("new/0001.jpg", "rb").read(), b"no photo"])
    >>> good.status, good.label in model.package.classes, 0 < good.confidence <= 1
    ('ok', True, True)
    >>> bad.status, bad.error_code
    ('error', 'E_NOT_IMAGE')

    Raises:
        ModelRejectedError: there is none, or it is broken.
    """
    from fruitray.package import load_package
    from fruitray.predictor import Predictor

    return Predictor(load_package(uri))
