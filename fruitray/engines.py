"""Engines: ways to compute one network. They differ in speed and in start; one is used only if, on pictures made to see
it, its scores are within `TOLERANCE` of plain PyTorch's.

    eager      PyTorch, with batch norm folded into the convolutions before it
    compile    torch.compile with frozen weights: slow to start
    openvino   OpenVINO (extra `openvino`), on CPUs of any maker

All compute in bfloat16 where the device is fast at it, unless full precision is asked for. Not here: what surrounds a
network, such as mirrored views and temperatures (`inference.py`).
"""

import copy
import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fruitray.backbones import Classifier, allow_tf32, fast_in_bfloat16
from fruitray.errors import GpuFullError, UsageError
from fruitray.machine import has_compiler
from fruitray.memory import as_out_of_memory, full_gpu_told, in_halves

EngineName = Literal["eager", "compile", "openvino"]
TOLERANCE = 2e-2
"""How far a score may be from that of plain PyTorch in float32."""
COMPILE_PAYS = 50_000
"""Photos per worker from which compiling takes less time than it saves; see tests/benchmarks/RESULTS.md."""
CPU_BATCH, GPU_BATCH = 4, 64
"""Photos per pass. More do not fit a CPU's caches, fewer leave a GPU idle."""

Outputs = tuple[torch.Tensor, torch.Tensor]
"""(B, C) float32 logits and (B, D) float32 embeddings."""


@dataclass(frozen=True, slots=True)
class Engine:
    """(B, 3, S, S) uint8 on the CPU -> logits and embeddings on the CPU, `batch` photos at a time."""

    name: str
    """With the precision, for people."""
    batch: int
    compute: Callable[[torch.Tensor], Outputs]

    def __call__(self, photos: torch.Tensor) -> Outputs:
        """What the network says of each photo.

        Raises:
            GpuFullError: the GPU's memory is too small for a single one.
        """
        starts = range(0, len(photos), self.batch)
        with torch.inference_mode(), full_gpu_told():
            return _together([in_halves(self.compute, photos[start:][: self.batch], _together) for start in starts])


def _together(pieces: Sequence[Outputs]) -> Outputs:
    return torch.cat([logits for logits, _ in pieces]), torch.cat([embeddings for _, embeddings in pieces])


def pick_engine(photos: int, *, gpu: bool) -> EngineName:
    """The quickest for so many `photos` per worker, of those that are installed."""
    if gpu:
        return "eager"
    if importlib.util.find_spec("openvino"):
        return "openvino"
    return "compile" if photos >= COMPILE_PAYS and has_compiler() else "eager"


def require_engine(name: EngineName, *, gpu: bool) -> None:
    """Raise `UsageError` where the engine is not installed, or does not run on such devices."""
    if name == "openvino" and gpu:
        raise UsageError("--engine openvino: computes on CPUs only")
    if name == "openvino" and not importlib.util.find_spec("openvino"):
        raise UsageError("--engine openvino: needs `pip install 'fruitray[openvino]'`")


def make_engine(
    name: EngineName,
    model: Classifier,
    device: torch.device,
    *,
    full_precision: bool = False,
    batch: int = 0,
    temperature: float = 1.0,
) -> Engine:
    """`model`, evaluating, made ready on `device`; `batch` photos per pass, 0 for what suits the device.

    One that cannot compute this network, or whose scores (logits divided by `temperature`) leave the tolerance on a few
    pictures made for that, is replaced by plain PyTorch in float32.

    Raises:
        UsageError: the engine is not installed, or does not run on this device.
        GpuFullError: the GPU's memory is too small for it.
    """
    require_engine(name, gpu=device.type != "cpu")
    if device.type == "cuda":
        allow_tf32(False)
    batch = batch or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
    with full_gpu_told():
        reference = copy.deepcopy(model).to(device).eval()
    reference.full_precision = True
    plain = Engine("eager in float32", batch, _on(device, _Outputs(_Embedding(reference))))
    narrow = fast_in_bfloat16(device) and not full_precision
    makers = {"eager": _eager, "compile": _compiled, "openvino": _openvino}
    try:
        with full_gpu_told():
            compute = makers[name](copy.deepcopy(model).to(device).eval(), device, batch, narrow)
        engine = Engine(f"{name} in {'bfloat16' if narrow else 'float32'}", batch, compute)
        agrees = _agree(engine, plain, model.preprocessing.size, temperature)
    except (MemoryError, GpuFullError):
        raise
    except Exception:  # of any type: networks that cannot be traced or converted, a compiler that is missing
        return replace(plain, name=f"{plain.name}, for {name} cannot compute this network")
    return engine if agrees else replace(plain, name=f"{plain.name}, for {name} answers otherwise")


def _agree(engine: Engine, other: Engine, size: int, temperature: float) -> bool:
    noise = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1)
    photos = (255 * smooth).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    ours, theirs = ((some(photos)[0] / temperature).softmax(dim=1) for some in (engine, other))
    return bool(((ours - theirs).abs() <= TOLERANCE).all())  # what is no number is not


class _Embedding(nn.Module):
    """(B, 3, S, S) uint8 -> (B, D) float32 by a classifier's trunk, which computes in `dtype`."""

    def __init__(self, model: Classifier, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        inputs = (photos.float() - self.model.mean) / self.model.std
        embeddings: torch.Tensor = self.model.trunk(inputs.to(self.dtype)).float()
        return embeddings


class _Outputs(nn.Module):
    """What an engine computes, of an embedding; the head stays in float32."""

    def __init__(self, embedding: _Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, photos: torch.Tensor) -> Outputs:
        embeddings = self.embedding(photos)
        return self.embedding.model.head(embeddings), embeddings


def _on(device: torch.device, module: Callable[[torch.Tensor], Outputs]) -> Callable[[torch.Tensor], Outputs]:
    def compute(photos: torch.Tensor) -> Outputs:
        logits, embeddings = module(photos.to(device, non_blocking=True))
        return logits.cpu(), embeddings.cpu()

    return compute


def _eager(model: Classifier, device: torch.device, batch: int, narrow: bool) -> Callable[[torch.Tensor], Outputs]:
    return _on(device, _folded(model, narrow))


def _compiled(model: Classifier, device: torch.device, batch: int, narrow: bool) -> Callable[[torch.Tensor], Outputs]:
    compiled = torch.compile(_folded(model, narrow), dynamic=False, options={"freezing": True})
    return _on(device, _padded(compiled, batch))


def _openvino(model: Classifier, device: torch.device, batch: int, narrow: bool) -> Callable[[torch.Tensor], Outputs]:
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    size = model.preprocessing.size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out; OpenVINO reads torch.export's graphs slower
        example = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        traced = torch.jit.trace(_Embedding(model), example, check_trace=False)  # type: ignore[no-untyped-call]
        frontend = FrontEndManager().load_by_framework("pytorch")  # openvino.convert_model would report to its makers
        decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion
        converted = frontend.convert(frontend.load(decoder))
    converted.reshape([batch, 3, size, size])
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # else the workers of one machine all take the same core
    }
    compiled = openvino.compile_model(converted, "CPU", settings)

    def compute(photos: torch.Tensor) -> Outputs:
        [answer] = compiled(photos.contiguous().numpy()).values()
        embeddings = torch.tensor(answer)
        return model.head(embeddings), embeddings  # the head stays in float32, as everywhere

    return _padded(compute, batch)


def _padded(compute: Callable[[torch.Tensor], Outputs], batch: int) -> Callable[[torch.Tensor], Outputs]:
    """For what is compiled for so many photos, and for fewer only where memory is too small for them."""
    most = batch

    def padded(photos: torch.Tensor) -> Outputs:
        nonlocal most
        if len(photos) > most:
            raise torch.OutOfMemoryError  # as it did when there were so many
        while True:
            missing = most - len(photos)
            try:
                with as_out_of_memory():
                    logits, embeddings = compute(F.pad(photos, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else photos)
                return logits[: len(photos)], embeddings[: len(photos)]
            except torch.OutOfMemoryError:
                if not missing:
                    most = max(1, most // 2)
                    raise
                most = max(len(photos), most // 2)

    return padded


def _folded(model: Classifier, narrow: bool) -> _Outputs:
    fold_batch_norm(model.trunk)
    dtype = torch.bfloat16 if narrow else torch.float32
    model.trunk.to(dtype).to(memory_format=torch.channels_last)
    return _Outputs(_Embedding(model, dtype))


class _Tracer(fx.Tracer):
    """Sees a convolution or a batch norm as one step, whichever library's it is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norm(network: nn.Module) -> int:
    """Fold each batch norm of an evaluating `network` into the convolution before it, in place; answers how many.

    None in a network that torch.fx cannot trace, as where the way through it depends on the photo.
    """
    try:
        steps = list(_Tracer().trace(network).nodes)
    except Exception:  # of many types
        return 0
    modules = dict(network.named_modules(remove_duplicate=False))
    called = [step for step in steps if step.op == "call_module"]
    times = Counter(modules[str(step.target)] for step in called)
    folded = 0
    for step in called:
        source = step.args[0] if step.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        norm, convolution = modules[str(step.target)], modules[str(source.target)]
        alone = len(source.users) == 1 and times[norm] == times[convolution] == 1
        if isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d) and alone:
            network.set_submodule(str(source.target), fuse_conv_bn_eval(convolution, norm))
            network.set_submodule(str(step.target), _what_else(norm))
            folded += 1
    return folded


def _what_else(norm: nn.BatchNorm2d) -> nn.Module:
    """What a batch norm does besides: those of timm activate, too."""
    return nn.Sequential(*(part for name, part in norm.named_children()))
