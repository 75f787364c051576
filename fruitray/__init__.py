"""fruitray: from a bucket of labelled photos to a scored Parquet table.

photos in storage -> index -> split -> batches | features -> fit -> model package -> predictor -> scores (Parquet)
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
