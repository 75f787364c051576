"""List of file contents -> list of `Prediction`, one each, in order."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fruitray.backbones import pick_device
from fruitray.engines import EngineName, make_engine
from fruitray.errors import ImageError
from fruitray.images import decode
from fruitray.memory import keep_freed_memory
from fruitray.package import Package
from fruitray.preprocess import stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is said of one photo. On `status` `error`, the code says why and scores are None."""

    label: str | None = None
    confidence: float | None = None
    top_labels: list[str] | None = None
    top_scores: list[float] | None = None
    """Calibrated softmax shares, falling."""
    status: str = "ok"
    error_code: str | None = None
    error: str | None = None
    width: int | None = None
    """Pixels, as is `height`, after EXIF rotation."""
    height: int | None = None
    embedding: NDArray[np.float32] | None = None
    """(D,) what the head saw of the photo as it is; only if asked for."""


@dataclass(frozen=True, slots=True)
class Square:
    """A photo at the size that the network sees."""

    pixels: torch.Tensor
    """(3, S, S) uint8."""
    width: int
    """Pixels of the photo itself, as is `height`."""
    height: int


class Predictor:
    """A package, ready on this process's device. Batches are cut from the readable photos in order, so equal lists give
    equal predictions. `batch_size` 0 takes what suits the device."""

    def __init__(
        self,
        package: Package,
        *,
        top_k: int = 3,
        batch_size: int = 0,
        gpu: bool = True,
        engine: EngineName = "eager",
        full_precision: bool = False,
        embeddings: bool = False,
    ) -> None:
        self.package = package
        self._top_k = min(top_k, len(package.classes))
        self._embeddings = embeddings
        self.seconds = 0.0
        """Spent computing so far."""
        keep_freed_memory()
        device = pick_device(gpu=gpu)
        self.engine = make_engine(
            engine,
            package.model,
            device,
            full_precision=full_precision,
            batch=batch_size,
            temperature=package.inference.temperature,
        )

    def predict(self, contents: Iterable[bytes | ImageError]) -> list[Prediction]:
        """One prediction per item; an item that could not be fetched comes as its `ImageError`."""
        return self.predict_squares(map(self._decoded, contents))

    @property
    def enough(self) -> int:
        """See `Preprocessing.enough`."""
        return self.package.model.preprocessing.enough

    def square(self, pixels: NDArray[np.uint8], width: int, height: int) -> Square:
        """(3, H, W) uint8 RGB of a photo of that size -> what `predict_squares` takes. May be called by several
        threads."""
        return Square(self.package.model.preprocessing.resize(pixels), width, height)

    def predict_squares(self, squares: Iterable[Square | ImageError]) -> list[Prediction]:
        """One prediction per photo; one that could not be decoded comes as its `ImageError`."""
        predictions: list[Prediction | None] = []
        waiting: list[tuple[int, Square]] = []
        for position, square in enumerate(squares):
            predictions.append(None)
            if isinstance(square, ImageError):
                predictions[position] = Prediction(status="error", error_code=square.code, error=square.detail)
                continue
            waiting.append((position, square))
            if len(waiting) == self.engine.batch:
                self._flush(waiting, predictions)
        if waiting:
            self._flush(waiting, predictions)
        return [prediction for prediction in predictions if prediction is not None]

    def _flush(self, waiting: list[tuple[int, Square]], predictions: list[Prediction | None]) -> None:
        """Predict the waiting photos, write them to their positions, and forget them."""
        start = time.perf_counter()
        seen: list[torch.Tensor] = []  # embeddings of each view, of the photos themselves first

        def logits(view: torch.Tensor) -> torch.Tensor:
            answer, embeddings = self.engine(view)
            seen.append(embeddings)
            return answer

        inference = self.package.inference
        shares = inference.scores(inference.logits(logits, stack([square.pixels for _, square in waiting])))
        scores, numbers = shares.topk(self._top_k, dim=1)
        rows = zip(waiting, scores.tolist(), numbers.tolist(), seen[0].numpy(), strict=True)
        for (position, square), row, classes, embedding in rows:
            labels = [self.package.classes[number] for number in classes]
            predictions[position] = Prediction(
                label=labels[0],
                confidence=row[0],
                top_labels=labels,
                top_scores=row,
                width=square.width,
                height=square.height,
                embedding=embedding if self._embeddings else None,
            )
        waiting.clear()
        self.seconds += time.perf_counter() - start

    def _decoded(self, content: bytes | ImageError) -> Square | ImageError:
        if isinstance(content, ImageError):
            return content
        try:
            photo = decode(content, self.enough)
            return self.square(photo.pixels, photo.width, photo.height)
        except ImageError as error:
            return error
