"""Behaviour of the training loop, over toys of a few numbers."""

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from fruitray.backbones import Classifier, freeze
from fruitray.batches import Batches
from fruitray.config import FitConfig
from fruitray.errors import DivergedError, UsageError
from fruitray.fit import Epoch, Pause, evaluate, fit, fit_with_pauses
from fruitray.metrics import confusion
from fruitray.preprocess import Preprocessing
from fruitray.steps import cut, prepare, use_threads
from tests.unit.runs import through_a_file

CPU = torch.device("cpu")
PLAIN = FitConfig(epochs=6, batch_size=16, learning_rate=0.02, patience=6, label_smoothing=0.0)


def clouds(sample: int, examples: int = 120, spread: float = 0.3, **settings: Any) -> Batches:
    """Points (N, 2) around three centres; the label is the centre's number."""
    generator = torch.Generator().manual_seed(sample)
    labels = torch.arange(examples) % 3
    centres = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    points = centres[labels] + spread * torch.randn(examples, 2, generator=generator)
    plain = {"inputs": points, "labels": labels, "rows": torch.arange(examples), "classes": 3, "batch_size": 16}
    return Batches(**{**plain, **settings})


def misleading() -> Batches:
    """Clouds under wrong labels: the better the right ones are learned, the worse it goes here."""
    val = clouds(2)
    return replace(val, labels=(val.labels + 1) % 3)


def network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def training(module: nn.Module, config: FitConfig = PLAIN, **settings: Any) -> Iterator[Epoch]:
    """`fit` over shuffled clouds, whatever is not given otherwise."""
    train = settings.pop("train", None) or clouds(1, shuffle=True, seed=config.seed)
    val = settings.pop("val", None) or clouds(2)
    return fit(module, train, val, config, device=CPU, **settings)


def weights(module: nn.Module) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in module.state_dict().items()}


def measured(epoch: Epoch) -> tuple[Any, ...]:
    """All that must repeat exactly."""
    best = epoch.best_number, epoch.best_predictions.tolist()
    return epoch.number, epoch.train_loss, epoch.val_loss, epoch.counts.tolist(), *best


def test_a_separable_toy_is_learned() -> None:
    epochs = list(training(network()))
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1].train_loss < epochs[0].train_loss / 2
    assert epochs[-1].accuracy > 0.95
    assert all(epoch.seconds > 0 and epoch.images_per_s > 0 for epoch in epochs)


def test_an_epoch_counts_every_validation_example_once() -> None:
    for epoch in training(network()):
        assert epoch.counts.sum(dim=1).tolist() == [40, 40, 40]


def test_the_best_epochs_weights_are_restored() -> None:
    module = network()
    epochs = list(training(module, val=misleading()))
    best = max(epochs, key=lambda epoch: (epoch.accuracy, -epoch.val_loss))
    assert best is not epochs[-1]
    assert epochs[-1].best_number == best.number
    loss, predictions = evaluate(module, misleading(), CPU)
    assert (loss, predictions.tolist()) == (best.val_loss, epochs[-1].best_predictions.tolist())
    assert torch.equal(confusion(predictions, misleading().labels, 3), best.counts)


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_when_patience_is_at_its_end(patience: int) -> None:
    epochs = list(training(network(), replace(PLAIN, epochs=20, patience=patience), val=misleading()))
    assert epochs[-1].number == epochs[-1].best_number + patience < 20


@pytest.mark.parametrize("side", ["train", "val"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_an_error(side: str, value: float) -> None:
    broken = clouds(1)
    broken.inputs[7] = value
    with pytest.raises(DivergedError) as caught:
        list(training(network(), **{side: broken}))
    assert caught.value.epoch == 1


@pytest.mark.parametrize("policy", ["eightfold+jitter", "report+mixup+cutmix"])
def test_augmented_photos_are_learned(policy: str) -> None:
    """Bright and dark photos; mixed ones have two labels."""
    labels = torch.arange(60) % 2
    photos = (40 + 160 * labels.byte())[:, None, None, None].expand(-1, 3, 8, 8)
    train = Batches(
        inputs=photos, labels=labels, rows=torch.arange(60), classes=2, batch_size=16, shuffle=True, policy=policy
    )
    module = nn.Sequential(Scale(), nn.Flatten(), nn.Linear(192, 2))
    val = replace(train, policy="none")
    assert list(training(module, replace(PLAIN, epochs=10), train=train, val=val))[-1].accuracy == 1


class Scale(nn.Module):
    """0..255 -> -0.5..0.5."""

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        return photos / 255 - 0.5


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_equals_an_undisturbed_one(stop: int) -> None:
    undisturbed, first, second = (network(dropout=0.3) for _ in range(3))
    expected = [measured(epoch) for epoch in training(undisturbed)]
    found = []
    for epoch in training(first):
        found.append(measured(epoch))
        if epoch.number == stop:
            state = through_a_file(epoch.state)
            break
    torch.rand(5)  # another process has another random state
    found += [measured(epoch) for epoch in training(second, resume=state)]
    assert found == expected
    assert weights(second) == weights(undisturbed)


@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.9},
        {"optimizer": "sgd"},
        {"optimizer": "adam", "schedule": "constant"},
        {"accumulate": 3, "warmup": 0.3},
    ],
)
def test_whatever_the_options_a_resumed_run_equals_an_undisturbed_one(options: dict[str, Any]) -> None:
    config = replace(PLAIN, **options)
    undisturbed, first, second = (network(dropout=0.3) for _ in range(3))
    expected = [measured(epoch) for epoch in training(undisturbed, config)]
    state = next(through_a_file(epoch.state) for epoch in training(first, config) if epoch.number == 2)
    assert [measured(epoch) for epoch in training(second, config, resume=state)] == expected[2:]
    assert weights(second) == weights(undisturbed)


class Counting(nn.Sequential):
    """Counts the examples that it is trained on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(*inner)
        self.trained = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.trained += len(inputs) * self.training
        logits: torch.Tensor = super().forward(inputs)
        return logits


def pausing(module: nn.Module, config: FitConfig = PLAIN, **settings: Any) -> Iterator[Epoch | Pause]:
    """`training` with 15 steps in an epoch, and a pause wherever there can be one."""
    train = clouds(1, shuffle=True, batch_size=8)
    return fit_with_pauses(module, train, clouds(2), config, device=CPU, due=lambda: True, **settings)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "accumulate": 2, "warmup": 0.2}])
def test_a_run_broken_off_within_an_epoch_goes_on_from_there(options: dict[str, Any]) -> None:
    config = replace(PLAIN, epochs=3, **options)
    undisturbed = network(dropout=0.3)
    moments = [(moment, through_a_file(moment.state)) for moment in pausing(undisturbed, config)]
    assert [isinstance(moment, Epoch) for moment, _ in moments] == [False, True] * 3
    for place, (_, state) in enumerate(moments):
        module = Counting(network(dropout=0.3))
        rest = [measured(moment) for moment in pausing(module, config, resume=state) if isinstance(moment, Epoch)]
        assert rest == [measured(moment) for moment, _ in moments[place + 1 :] if isinstance(moment, Epoch)]
        assert weights(module) == weights(undisturbed)
        left = 3 * 120 - state["number"] * 120 - state["step"] * 8
        assert module.trained == left, "what was done is not done again"


def test_pauses_change_nothing() -> None:
    paused, straight = network(dropout=0.3), network(dropout=0.3)
    found = [measured(moment) for moment in pausing(paused) if isinstance(moment, Epoch)]
    assert found == [measured(epoch) for epoch in training(straight, train=clouds(1, shuffle=True, batch_size=8))]


TOO_MANY = torch.OutOfMemoryError("too many")


class Narrow(nn.Module):
    """A network that has memory for so many examples at once."""

    def __init__(self, most: int, full: RuntimeError = TOO_MANY) -> None:
        super().__init__()
        self.inner, self.most, self.full = nn.Sequential(network()[0], nn.Tanh(), network()[4]), most, full

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and len(inputs) > self.most:
            raise self.full
        logits: torch.Tensor = self.inner(inputs)
        return logits


def test_out_of_memory_halves_what_is_computed_at_once_and_keeps_the_batch() -> None:
    roomy, narrow = Narrow(16), Narrow(5)
    expected, found = list(training(roomy)), list(training(narrow))
    assert {epoch.parts for epoch in expected} == {1}
    assert {epoch.parts for epoch in found} == {4}
    for one, other in zip(expected, found, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-4)
    for name, tensor in roomy.state_dict().items():
        torch.testing.assert_close(narrow.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "told",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "FIND was unable to find an engine to execute this computation",
        "GET was unable to find an engine to execute this computation",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA driver error: out of memory",
        "NCCL Error 1: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_what_cuda_and_its_libraries_call_no_memory_is_out_of_memory(told: str) -> None:
    assert {epoch.parts for epoch in training(Narrow(5, RuntimeError(told)))} == {4}


def test_other_errors_of_cuda_do_not_make_smaller_parts() -> None:
    with pytest.raises(RuntimeError, match="device-side assert"):
        list(training(Narrow(5, RuntimeError("CUDA error: device-side assert triggered"))))


def test_a_resumed_run_remembers_how_much_memory_there_is() -> None:
    state = next(training(Narrow(5))).state
    assert next(training(Narrow(16), resume=state)).parts == 4


class Crowded(nn.Module):
    """A network that has memory for three examples at once."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 3:
            raise TOO_MANY
        return inputs @ torch.eye(2, 3)


def test_out_of_memory_in_validation_takes_smaller_batches() -> None:
    val = clouds(2)
    _, predictions = evaluate(Crowded(), val, CPU)
    assert predictions.tolist() == (val.inputs @ torch.eye(2, 3)).argmax(dim=1).tolist()


def test_an_operation_that_is_not_deterministic_is_told_where_that_was_asked_for() -> None:
    class Chance(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("some_backward_cuda does not have a deterministic implementation, but you set ...")
            return super().forward(inputs)

    with pytest.raises(UsageError, match=r"--deterministic.*some_backward_cuda"):
        next(training(Chance(2, 3), replace(PLAIN, deterministic=True)))


def test_workers_drop_out_each_for_itself() -> None:
    """Else every photo of a batch's one share would lose what its neighbour in the other loses."""
    same = clouds(1, examples=2)
    same = replace(same, inputs=torch.ones(2, 2), labels=torch.zeros(2, dtype=torch.int64), batch_size=2)
    losses = set()
    for rank in range(2):
        module = nn.Sequential(network()[0], nn.Dropout(0.5), network()[4])
        share = replace(same, rank=rank, world=2)
        losses.add(next(training(module, train=share, val=same)).train_loss)
    assert len(losses) == 2


def test_out_of_memory_with_a_single_photo_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        list(training(Narrow(0)))


def test_a_lone_photo_before_batch_norm_is_told() -> None:
    lonely = replace(clouds(1, examples=9), batch_size=2)
    module = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(UsageError, match=r"--batch-size 2.*one photo"):
        list(training(module, replace(PLAIN, batch_size=2), train=lonely))


def test_parts_that_were_asked_for_by_who_knows_the_memory_are_no_fault_of_the_batch_size() -> None:
    assert next(training(network(), parts=4)).parts == 4
    with pytest.raises(torch.OutOfMemoryError):
        list(training(nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), parts=PLAIN.batch_size))


def test_photos_that_fit_only_one_by_one_are_too_many_before_batch_norm() -> None:
    class Small(nn.Sequential):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if len(inputs) > 1:
                raise TOO_MANY
            return super().forward(inputs)

    with pytest.raises(torch.OutOfMemoryError):
        list(training(Small(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_every_optimizer_learns_the_toy(optimizer: str, schedule: str) -> None:
    config = replace(PLAIN, optimizer=optimizer, schedule=schedule, warmup=0.1)
    assert list(training(network(), config))[-1].accuracy > 0.95


def test_a_step_in_parts_is_the_step() -> None:
    """Without batch norm, which sees the parts alone."""
    whole, parts = (nn.Sequential(network()[0], nn.Tanh(), network()[4]) for _ in range(2))
    expected = list(training(whole))
    found = list(training(parts, replace(PLAIN, accumulate=5)))
    for one, other in zip(expected, found, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-4)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_average_is_what_is_validated_and_kept() -> None:
    """Under a constant learning rate the weights keep jumping about; their average does not."""
    config = replace(PLAIN, epochs=12, patience=12, schedule="constant", learning_rate=0.2)
    last, average = network(), network()
    rough = [epoch.val_loss for epoch in training(last, config)]
    smooth = [epoch.val_loss for epoch in training(average, replace(config, ema=0.98))]
    assert sum(smooth[4:]) < sum(rough[4:])
    loss, _ = evaluate(average, clouds(2), CPU)
    assert loss in smooth


def test_what_points_is_no_average() -> None:
    module = network()
    module.register_buffer("places", torch.arange(2401))
    list(training(module, replace(PLAIN, epochs=3, ema=0.998)))
    assert torch.equal(module.places, torch.arange(2401))


def test_a_rare_class_weighs_as_much_as_the_others() -> None:
    """Two overlapping clouds of 190 and 10: who counts photos never says the rare class, who counts classes does."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(200) >= 190).long()
    points = labels[:, None] * 1.0 + torch.randn(200, 2, generator=generator)
    toy = {"inputs": points, "labels": labels, "rows": torch.arange(200), "classes": 2, "batch_size": 50}
    found = []
    for weighed in (False, True):
        config = replace(PLAIN, class_weights=weighed, epochs=20, patience=20)
        [*_, last] = training(nn.Linear(2, 2), config, train=Batches(**toy, shuffle=True), val=Batches(**toy))
        found.append(last.counts[1, 1].item() / 10)
    assert found[0] < 0.3
    assert found[1] > 0.5


@pytest.mark.parametrize("policy", ["none", "mixup"])
def test_a_very_rare_class_is_not_what_a_smoothed_target_of_another_says(policy: str) -> None:
    """Sixty to one, and easy to tell apart: torch's own weights would have all taken for the rare class."""
    labels = (torch.arange(610) >= 600).long()
    photos = (20 + 200 * labels.byte())[:, None, None, None].expand(-1, 3, 4, 4)
    toy = {"inputs": photos, "labels": labels, "rows": torch.arange(610), "classes": 2, "batch_size": 61}
    head = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    model = Classifier(nn.Flatten(), head, Preprocessing(size=4))
    config = replace(PLAIN, class_weights=True, label_smoothing=0.1, epochs=10, patience=10)
    [*_, last] = training(model, config, train=Batches(**toy, shuffle=True, policy=policy), val=Batches(**toy))
    assert last.accuracy > 0.95


def test_clipped_gradients_move_the_weights_less() -> None:
    """With plain steps; Adam's do not depend on the size of gradients."""
    moved = []
    for norm in (0.0, 0.01):
        module = nn.Linear(2, 3)
        before = module.weight.detach().clone()
        list(training(module, replace(PLAIN, optimizer="sgd", epochs=1, clip_norm=norm, weight_decay=0.0)))
        moved.append(float((module.weight - before).norm().detach()))
    assert moved[1] < moved[0] / 5


def test_an_epoch_tells_its_last_learning_rate() -> None:
    constant = replace(PLAIN, schedule="constant", epochs=3)
    assert [epoch.learning_rate for epoch in training(network(), constant)] == [0.02] * 3
    cosine = [epoch.learning_rate for epoch in training(network(), PLAIN)]
    assert cosine == sorted(cosine, reverse=True)
    assert 0 < cosine[-1] < 0.001 < 0.018 < cosine[0] < 0.02


def test_the_warm_up_starts_with_small_steps() -> None:
    def first_move(warmup: float) -> float:
        module = network()
        before = module[0].weight.detach().clone()
        next(training(module, replace(PLAIN, epochs=20, warmup=warmup)))
        return float((module[0].weight - before).norm().detach())

    assert first_move(0.9) < first_move(0.0) / 3


def test_every_step_of_a_warm_up_trains() -> None:
    few = clouds(1, examples=8)
    module = network()
    before = weights(module)
    [epoch] = training(module, replace(PLAIN, epochs=1, warmup=0.5), train=replace(few, batch_size=8))
    assert epoch.learning_rate == pytest.approx(PLAIN.learning_rate)
    assert weights(module) != before


def photos_and_model(**settings: Any) -> tuple[Batches, Classifier]:
    """Bright and dark photos, and a small classifier with a normalised trunk."""
    labels = torch.arange(60) % 2
    photos = (40 + 160 * labels.byte())[:, None, None, None].expand(-1, 3, 8, 8)
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Classifier(trunk, nn.Linear(4, 2), Preprocessing(size=8))
    toy = {"inputs": photos, "labels": labels, "rows": torch.arange(60), "classes": 2, "batch_size": 16}
    return Batches(**{**toy, "shuffle": True, **settings}), model


def test_the_head_is_trained_first_and_then_all_of_it() -> None:
    train, model = photos_and_model()
    moved = []
    before = weights(model)
    for _ in training(model, replace(PLAIN, epochs=5, head_epochs=2), train=train, val=train):
        after = weights(model)
        moved.append({name.partition(".")[0] for name in after if after[name] != before[name]})
        before = after
    assert moved == [{"head"}] * 2 + [{"head", "trunk"}] * 3


def test_patience_is_for_the_whole_network_and_not_for_its_head_alone() -> None:
    train, model = photos_and_model()
    config = replace(PLAIN, epochs=9, head_epochs=5, patience=2, learning_rate=1e-12)  # it gets no better
    numbers = [epoch.number for epoch in training(model, config, train=train, val=train)]
    assert numbers[-1] == config.head_epochs + config.patience


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_staged_run_resumes_in_its_stage(stop: int) -> None:
    config = replace(PLAIN, epochs=5, head_epochs=2, ema=0.5)
    runs = []
    for _ in range(3):
        train, model = photos_and_model()
        runs.append((model, lambda model=model, train=train, **s: training(model, config, train=train, val=train, **s)))
    (undisturbed, calm), (_, broken), (second, resumed) = runs
    expected = [measured(epoch) for epoch in calm()]
    state = next(through_a_file(epoch.state) for epoch in broken() if epoch.number == stop)
    assert [measured(epoch) for epoch in resumed(resume=state)] == expected[stop:]
    assert weights(second) == weights(undisturbed)


def test_a_frozen_trunk_stays_frozen_through_all_stages() -> None:
    train, model = photos_and_model()
    freeze(model)
    before = weights(model.trunk)
    list(training(model, replace(PLAIN, head_epochs=1), train=train, val=train))
    assert weights(model.trunk) == before


def test_the_trunk_learns_at_its_own_rate() -> None:
    moved = []
    for rate in (1.0, 1e-4):
        train, model = photos_and_model()
        before = model.trunk[0].weight.detach().clone()
        list(training(model, replace(PLAIN, trunk_rate=rate, weight_decay=0.0), train=train, val=train))
        moved.append(float((model.trunk[0].weight - before).norm().detach()))
    assert moved[1] < moved[0] / 100


def test_a_loss_that_is_no_number_ends_a_long_epoch_early() -> None:
    train = clouds(1, examples=3000, batch_size=1)
    train.inputs[40] = float("nan")
    seen = []
    module = network()[0:1]
    module.append(nn.Linear(16, 3))
    module.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(DivergedError):
        list(training(module, train=train))
    assert len(seen) < 200


def test_compiling_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="--compile"):
        next(training(network(), replace(PLAIN, compile=True)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_learns_the_same() -> None:
    plain, compiled = network(), network()
    expected = list(training(plain, replace(PLAIN, epochs=2)))
    found = list(training(compiled, replace(PLAIN, epochs=2, compile=True)))
    for one, other in zip(expected, found, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-3)
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_resuming_a_finished_run_only_restores_the_best_weights() -> None:
    first, second = network(), network(seed=5)
    config = replace(PLAIN, patience=2, epochs=30)
    states = [through_a_file(epoch.state) for epoch in training(first, config, val=misleading())]
    assert len(states) < 30
    assert list(training(second, config, val=misleading(), resume=states[-1])) == []
    assert weights(second) == weights(first)


def test_equal_runs_are_equal_and_another_seed_is_another_run() -> None:
    first, second, other = (network(dropout=0.3) for _ in range(3))
    runs = []
    for module, seed in ((first, 0), (second, 0), (other, 1)):
        torch.rand(seed + 3)
        runs.append([measured(epoch) for epoch in training(module, replace(PLAIN, seed=seed))])
    assert runs[0] == runs[1]
    assert weights(first) == weights(second)
    assert weights(other) != weights(first)


def test_frozen_parameters_stay_and_the_others_move() -> None:
    module = network()
    before = weights(module)
    module[0].requires_grad_(False)
    list(training(module))
    after = weights(module)
    assert after["0.weight"] == before["0.weight"]
    assert after["4.weight"] != before["4.weight"]


class Workers:
    """Two threads that sum tensors with one another, as two workers do over the network."""

    def __init__(self) -> None:
        self._barrier, self._given = threading.Barrier(2, timeout=20), [torch.zeros(0)] * 2

    def summing(self, rank: int) -> Any:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            self._given[rank] = tensor
            self._barrier.wait()
            total = self._given[0] + self._given[1]
            self._barrier.wait()
            return total

        return reduce


def test_two_workers_train_as_one_does() -> None:
    """Gradients are averaged between the workers, which is what DistributedDataParallel does."""
    # Batch norm sees half a batch on each of two workers, so it would differ; this network has none.
    alone, *pair = (nn.Sequential(network()[0], nn.Tanh(), network()[4]) for _ in range(3))
    train, val = clouds(1, examples=119, shuffle=True), clouds(2, examples=61)
    expected = list(training(alone, train=train, val=val))
    workers, found = Workers(), [[], []]

    def work(rank: int) -> None:
        reduce = workers.summing(rank)
        for parameter in pair[rank].parameters():
            parameter.register_hook(lambda gradient: reduce(gradient) / 2)
        share = {"rank": rank, "world": 2}
        epochs = training(pair[rank], train=replace(train, **share), val=replace(val, **share), reduce=reduce)
        found[rank] = list(epochs)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, first, second in zip(expected, *found, strict=True):
        assert first.counts.tolist() == second.counts.tolist() == one.counts.tolist()
        assert first.train_loss == second.train_loss == pytest.approx(one.train_loss, rel=1e-4)
        assert first.val_loss == second.val_loss == pytest.approx(one.val_loss, rel=1e-4)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(pair[0].state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
        assert torch.equal(pair[0].state_dict()[name], pair[1].state_dict()[name])


def test_evaluating_is_exact_and_leaves_the_module_as_it_is() -> None:
    module = network(dropout=0.5).train()
    before = weights(module)
    first, second = (evaluate(module, clouds(2), CPU) for _ in range(2))
    assert first[0] == second[0]
    assert weights(module) == before


def test_the_steps_become_small_towards_the_end() -> None:
    module = network()
    places = [torch.cat([tensor.detach().flatten() for tensor in module.parameters()])]
    for _ in training(module, replace(PLAIN, weight_decay=0.0), val=misleading()):
        places.append(torch.cat([tensor.detach().flatten() for tensor in module.parameters()]))
    moved = [float((after - before).abs().mean()) for before, after in pairwise(places)]
    assert moved[-1] < moved[0] / 5


def test_label_smoothing_raises_the_floor_of_the_loss() -> None:
    [*_, sharp] = training(network())
    [*_, smooth] = training(network(), replace(PLAIN, label_smoothing=0.3))
    assert smooth.train_loss > sharp.train_loss + 0.2


def test_numbers_below_the_least_normal_one_are_zero_in_every_thread() -> None:
    products = []

    def compute() -> None:
        use_threads(2)
        products.append(torch.full((1_000_000,), 1e-30) * torch.full((1_000_000,), 1e-10))

    thread = threading.Thread(target=compute)  # which alone is changed
    thread.start()
    thread.join()

    assert not products[0].any()
    assert torch.tensor(1e-30) * 1e-10 > 0


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("together", [16, 13, 7])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_parts_of_all_workers_are_those_of_one(parts: int, together: int, world: int) -> None:
    batch = torch.arange(together)
    cuts = [cut(batch[rank::world], parts, together=together, rank=rank, world=world) for rank in range(world)]
    for whole, shares in zip(batch.tensor_split(parts), zip(*cuts, strict=True), strict=True):
        assert torch.cat(shares).sort().values.tolist() == whole.tolist()
        assert all(len(share) for share in shares)


@pytest.mark.parametrize("full", [True, False])
def test_full_precision_is_no_tf32(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", full)
    before = torch.get_float32_matmul_precision()
    try:
        prepare(torch.device("cuda"), FitConfig(full_precision=full))
        assert torch.get_float32_matmul_precision() == ("highest" if full else "high")
        assert torch.backends.cudnn.allow_tf32 is not full
    finally:
        torch.set_float32_matmul_precision(before)
