"""Photos -> logits -> calibrated scores. Evaluation and predictor share this, through the model package."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from fruitray.config import require

TEMPERATURES = (0.01, 100.0)
"""Those that logits are divided by lie between these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """What is done around a trained model, and what its confidences mean; stands in package.json."""

    tta: bool = False
    """Test-time augmentation: logits are averaged over each photo and its mirror image."""
    temperature: float = 1.0
    """Divides the logits, so that confidences are frequencies (Guo et al., "On Calibration of Modern Neural Networks",
    ICML 2017)."""
    threshold: float | None = None
    """A photo with less confidence may show none of the classes; None: nobody has measured."""

    def __post_init__(self) -> None:
        require(isinstance(self.tta, bool), "tta", self.tta, "must be true or false")
        low, high = TEMPERATURES
        known = isinstance(self.temperature, float) and low <= self.temperature <= high
        require(known, "temperature", self.temperature, f"must be a number from {low} to {high}")
        share = isinstance(self.threshold, float) and 0 <= self.threshold <= 1
        require(self.threshold is None or share, "threshold", self.threshold, "must be a number from 0 to 1")

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """The fields among what `package.json` says.

        Raises:
            UsageError, KeyError: one is missing or makes no sense.
        """
        return cls(**{field.name: said[field.name] for field in fields(cls)})

    def logits(self, module: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """(B, ...) what `module` takes, (B, 3, S, S) uint8 photos with `tta` -> (B, C) float32."""
        logits = module(inputs)
        if self.tta:
            logits = (logits + module(inputs.flip(3))) / 2
        return logits

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, C) float32 logits -> (B, C) float32 shares of 1; the greatest of a row is its confidence."""
        return (logits / self.temperature).softmax(dim=1)


UNCALIBRATED = Inference()
"""Of a model that nobody has evaluated."""
