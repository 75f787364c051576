"""Another function in the place of one of torch's, whoever calls it: layers of torch, torchvision, timm or a user."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode


class StandIn(TorchFunctionMode):
    """While it lasts, `other` is called where `function` would be; what `other` calls is torch's own."""

    def __init__(self, function: Callable[..., Any], other: Callable[..., Any]) -> None:
        super().__init__()
        self._function, self._other = function, other

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return (self._other if func is self._function else func)(*args, **(kwargs or {}))
