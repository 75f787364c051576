"""List of file contents -> list of `Prediction`, one each, in order."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fruitray.backbones import pick_device
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


class Predictor:
    """A package, ready on this process's device. Batches are cut from the readable photos in order, so equal lists give
    equal predictions."""

    def __init__(self, package: Package, *, top_k: int = 3, batch_size: int = 32, gpu: bool = True) -> None:
        self.package = package
        self._top_k = min(top_k, len(package.classes))
        self._batch_size = batch_size
        self._device = pick_device(gpu=gpu)
        keep_freed_memory()
        self._model = package.model.to(self._device).eval()

    def predict(self, contents: Iterable[bytes | ImageError]) -> list[Prediction]:
        """One prediction per item; an item that could not be fetched comes as its `ImageError`."""
        return self.predict_decoded(map(_decoded, contents))

    def predict_decoded(self, photos: Iterable[NDArray[np.uint8] | ImageError]) -> list[Prediction]:
        """One prediction per photo, (3, H, W) uint8 RGB; one that could not be decoded comes as its `ImageError`."""
        predictions: list[Prediction | None] = []
        waiting: list[tuple[int, torch.Tensor, int, int]] = []
        for position, photo in enumerate(photos):
            predictions.append(None)
            if isinstance(photo, ImageError):
                predictions[position] = Prediction(status="error", error_code=photo.code, error=photo.detail)
                continue
            height, width = photo.shape[1:]
            waiting.append((position, self.package.model.preprocessing.resize(photo), width, height))
            if len(waiting) == self._batch_size:
                self._flush(waiting, predictions)
        if waiting:
            self._flush(waiting, predictions)
        return [prediction for prediction in predictions if prediction is not None]

    def _flush(self, waiting: list[tuple[int, torch.Tensor, int, int]], predictions: list[Prediction | None]) -> None:
        """Predict the waiting photos, write them to their positions, and forget them."""
        batch = stack([square for _, square, _, _ in waiting]).to(self._device)
        with torch.inference_mode():
            inference = self.package.inference
            shares = inference.scores(inference.logits(self._model, batch)).cpu()
        scores, numbers = shares.topk(self._top_k, dim=1)
        for (position, _, width, height), row, classes in zip(waiting, scores.tolist(), numbers.tolist(), strict=True):
            labels = [self.package.classes[number] for number in classes]
            predictions[position] = Prediction(
                label=labels[0], confidence=row[0], top_labels=labels, top_scores=row, width=width, height=height
            )
        waiting.clear()


def _decoded(content: bytes | ImageError) -> NDArray[np.uint8] | ImageError:
    try:
        return content if isinstance(content, ImageError) else decode(content).pixels
    except ImageError as error:
        return error
