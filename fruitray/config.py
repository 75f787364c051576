"""What every job can be told: one frozen dataclass per job, its field docstrings are its `--help`.

Nothing heavy is imported here, so `--help` answers at once; the code that obeys each config stands in the room of
the same name.
"""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

from fruitray.errors import UsageError

FIXED_AUGMENTATIONS = ("none", "mirror", "flips", "eightfold")
"""Policies that make one fixed set of variants, so that a frozen backbone can embed it once."""
MIXES = ("mixup", "cutmix")
"""Steps that blend a photo with another one, and its label with the other's."""
AUGMENTATIONS = (*FIXED_AUGMENTATIONS, "report", "crop", "jitter", "jpeg", "erase", "trivial", "rand", *MIXES)
"""The steps that a policy joins with `+`; what each does stands in `augment.py`."""
SCRATCH = ("mlp", "cnn", "cnn_bn")
"""Backbones that nobody has weights for: always trained whole, from random weights."""
NORMALISED = ("resne", "regnet", "densenet", "efficient", "mobile", "mnas", "shuffle", "inception", "googlenet", "_bn")
"""Parts of the names of networks that batch norm holds together."""
NORMALISED_OTHERWISE = ("nf_", "_gn", "_bit")
"""Parts of the names of those that are such by name only."""


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise `UsageError` naming field, value and rule unless `condition` holds."""
    if not condition:
        raise UsageError(f"--{name.replace('_', '-')} {value}: {rule}")


def require_policy(policy: str) -> None:
    """Raise `UsageError` unless `policy` names augmentation steps, each once, in an order that has a meaning."""
    steps = policy.split("+")
    for step in steps:
        require(step in AUGMENTATIONS, "augment", policy, f"join any of {', '.join(AUGMENTATIONS)} with +")
    require(len(set(steps)) == len(steps), "augment", policy, "must name no step twice")
    require(steps == ["none"] or "none" not in steps, "augment", policy, "none stands alone")
    require("eightfold" not in steps[1:], "augment", policy, "eightfold must come first")
    last = [step in MIXES for step in steps]
    require(last == sorted(last), "augment", policy, "mixup and cutmix must come last")


def _require_number(name: str, value: float | None) -> None:
    require(value is None or 0 <= value < math.inf, name, value, "must be a number from 0 up")


def _require_positive(name: str, value: float | None) -> None:
    require(value is None or 0 < value < math.inf, name, value, "must be a number above 0")


def _require_side(name: str, side: int | None) -> None:
    require(side is None or side >= 32, name, side, "must be at least 32")


def _require_view(image_size: int | None, crop: float | None) -> None:
    _require_side("image_size", image_size)
    require(crop is None or 0 <= crop <= 1, "crop", crop, "must lie in [0, 1]")


def parse_size(rule: str) -> tuple[int, int] | None:
    """(width, height) of `WIDTHxHEIGHT`, None of another rule."""
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", rule)
    return (int(sides[1]), int(sides[2])) if sides else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Read every photo once; write the index with a stratified, duplicate-safe split."""

    images: str
    """Folder or s3:// prefix that holds one folder of photos per class."""
    out: str
    """Folder or s3:// prefix for `index.parquet` and `audit.json`. The same command again, after the folder has grown,
    reads new and changed files only, and every photo keeps its split."""
    previous: str | None = None
    """An earlier index to go on from where --out is new."""
    size: str = "any"
    """`any`; `majority`: only photos of the size that most have; or only those of a given size, such as 300x300."""
    duplicates: Literal["keep-distinct", "keep-first", "keep-all"] = "keep-distinct"
    """Of byte-identical photos keep one; or of near duplicates, too; or all. Those that are kept share a split. Copies
    that lie in two classes are always left out."""
    near_duplicates: int = 8
    """Photos whose perceptual hashes differ in at most so many of 64 bits, and which have the same light and colours,
    are near duplicates; -1: none are."""
    val_fraction: float = 0.2
    """Share of the photos, in every class, held out for validation."""
    test_fraction: float = 0.0
    """Share of the photos, in every class, held out for a test that neither tune nor train ever sees."""
    folds: int = 0
    """Number the photos of train and val for cross-validation with so many folds; 0: do not."""
    seed: int = 0
    """Another seed draws another split."""
    probe: str | None = None
    """A pretrained backbone, as for `train`: on its embeddings a linear probe finds labels that look wrong, and ranks
    them in `suspects.parquet`."""
    weights: str = "imagenet"
    """Of the probe, as for `train`."""
    image_size: int | None = None
    """Of the probe, as for `train`."""
    gpu: bool = False
    """Embed the photos for the probe on GPUs."""
    show_augment: int = 0
    """Draw so many training photos, and what --augment makes of each, into `augment.png`."""
    augment: str = "eightfold"
    """The augmentation to draw, as for `train`."""
    config: str | None = None
    """A file with options to start from, JSON or YAML, such as the NAME.json that a job keeps; those given win."""
    report: bool = True
    """Draw what was found, and what it was made from, as a page: `report.html`."""
    dry_run: bool = False
    """Say whether every node of the cluster reaches all of it and has room for it, and write nothing."""

    def __post_init__(self) -> None:
        size = self.size in ("any", "majority") or parse_size(self.size) is not None
        require(size, "size", self.size, "must be any, majority, or WIDTHxHEIGHT in pixels")
        require(-1 <= self.near_duplicates <= 9, "near_duplicates", self.near_duplicates, "must lie between -1 and 9")
        require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "must lie between 0 and 1")
        together = self.val_fraction + self.test_fraction
        require(0 <= self.test_fraction < 1, "test_fraction", self.test_fraction, "must lie in [0, 1)")
        require(together < 1, "test_fraction", self.test_fraction, "must leave photos to train on, with --val-fraction")
        require(self.folds == 0 or self.folds >= 2, "folds", self.folds, "must be 2 at least, or 0")
        _require_number("show_augment", self.show_augment)
        require_policy(self.augment)
        require(not self.out.endswith(".parquet"), "out", self.out, "is a folder; the index in it is index.parquet")
        _require_side("image_size", self.image_size)
        if self.probe is not None:
            require(self.probe not in SCRATCH, "probe", self.probe, "nobody has weights for it that have learned")
            require(self.weights != "none", "weights", "none", "leaves --probe nothing that has learned")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network, from which weights."""

    backbone: str = "efficientnet_b2"
    """mlp, cnn, cnn_bn (cnn with batch norm), any classifier of torchvision such as vgg16, resnet50, efficientnet_b2 or
    mobilenet_v2, or timm/NAME."""
    weights: str = "imagenet"
    """`imagenet` (the library's download), `none` (random), or the path or URI of a .safetensors or state-dict file, or
    of a folder of NAME.safetensors files. A NAME.json beside a file corrects its preprocessing: size, mean, std, ...
    `mlp`, `cnn` and `cnn_bn` always start from random weights."""
    frozen: bool = False
    """Train the head alone; it is the network's last layer, or its last two with --hidden. Where the augmentation makes
    a fixed set of photos, their embeddings are computed once."""
    hidden: int | None = None
    """Units of a hidden layer in the head of a pretrained backbone, 0: none; the backbone's own when not given."""
    dropout: float | None = None
    """Dropout in the head; the backbone's own when not given."""
    image_size: int | None = None
    """Side in pixels of the square the network sees; what its weights were made for when not given, 300 for mlp and
    cnn, 128 for cnn_bn."""
    crop: float | None = None
    """Share of a photo's shorter side that is shown, from its middle; 0: all of the photo, squeezed into the square. As
    the weights were made for when not given."""

    def __post_init__(self) -> None:
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "must lie in [0, 1)")
        _require_view(self.image_size, self.crop)
        _require_number("hidden", self.hidden)
        if self.backbone in SCRATCH:
            known = self.weights in ("imagenet", "none")
            require(known, "weights", self.weights, f"{self.backbone} always starts from random weights")
            object.__setattr__(self, "weights", "none")
            require(self.hidden is None, "hidden", self.hidden, f"{self.backbone} has a head of its own")
            require(not self.frozen, "frozen", True, f"{self.backbone} has no pretrained weights to freeze")
        learned = self.weights != "none"
        require(learned or not self.frozen, "weights", "none", "leaves --frozen nothing that has learned")


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How the one training loop trains."""

    epochs: int = 20
    """At most so many passes over the training photos."""
    batch_size: int = 64
    """Photos per optimizer step, over all workers together."""
    accumulate: int = 1
    """Compute each step in so many parts, one after the other: less memory, the same step, but for batch norm, which
    sees each part alone."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """sgd has Nesterov momentum of 0.9."""
    learning_rate: float | None = None
    """Peak learning rate; what suits the backbone and the optimizer when not given."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after its warm-up: down to zero, or as it is."""
    warmup: float = 0.0
    """Share of all steps during which the learning rate climbs from zero to its peak."""
    weight_decay: float = 0.01
    """Of weight matrices and kernels; biases and normalisation layers have none. Decoupled with adamw."""
    clip_norm: float = 0.0
    """Scale gradients down to this norm where theirs is greater; 0: do not."""
    head_epochs: int = 0
    """Of a pretrained network, train only the head for so many epochs first, if there are more."""
    trunk_rate: float = 0.5
    """Of a pretrained network, the learning rate of everything below the head, as a share of the head's."""
    ema: float = 0.0
    """Validate, and keep, an exponential moving average of the weights, with this decay per step; 0: the weights."""
    label_smoothing: float = 0.1
    """Share of each target spread over all classes."""
    class_weights: bool = False
    """Weigh classes in the loss so that each weighs alike, however many photos it has."""
    patience: int = 3
    """Stop after so many epochs without a better one, by validation accuracy, then loss, those of --head-epochs not
    counted; the best epoch's weights are restored."""
    compile: bool = False
    """Use torch.compile, which takes a minute first."""
    full_precision: bool = False
    """Compute in float32 where bfloat16 is quicker, too."""
    deterministic: bool = False
    """On a GPU, use only operations that give the same bits in each run; a CPU does so anyway."""
    augment: str = "mirror"
    """What is done to the training photos: `none`, or steps joined by `+`, as in `mirror+jitter+mixup`.
    - mirror: flipped left-right half of the time
    - flips: and upside down half of the time
    - eightfold: the report's eight of each photo (first)
    - report: one of those eight, drawn anew each epoch
    - crop: a random box, a quarter of the photo at least, stretched to the square
    - jitter: brightness, contrast, saturation, hue
    - jpeg: compressed at a random quality
    - erase: half of the time, a box painted over
    - trivial: TrivialAugment
    - rand: RandAugment
    - mixup, cutmix: blended with another photo (last)
    Of a frozen backbone, none, mirror, flips and eightfold are embedded once; others are slow."""
    train_size: int | None = None
    """Side in pixels of the training photos where it is to be less than what the network validates, and is used, at:
    faster, and with crop, which shows things enlarged, no worse. Not for mlp, cnn or a frozen backbone."""
    seed: int = 0
    """Seeds the head, the order of the photos, augmentation and dropout."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "must be at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        require(1 <= self.accumulate <= self.batch_size, "accumulate", self.accumulate, "must lie in [1, --batch-size]")
        _require_positive("learning_rate", self.learning_rate)
        require(0 <= self.warmup < 1, "warmup", self.warmup, "must lie in [0, 1)")
        _require_number("weight_decay", self.weight_decay)
        _require_number("clip_norm", self.clip_norm)
        _require_number("head_epochs", self.head_epochs)
        _require_positive("trunk_rate", self.trunk_rate)
        require(0 <= self.ema < 1, "ema", self.ema, "must lie in [0, 1)")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "must lie in [0, 1)")
        require(self.patience >= 1, "patience", self.patience, "must be at least 1")
        require_policy(self.augment)
        _require_side("train_size", self.train_size)


Recipe = Literal["suited", "head", "whole", "report"]
RECIPES: dict[Recipe, FitConfig] = {
    "head": FitConfig(),
    "whole": FitConfig(
        batch_size=32,
        warmup=0.1,
        weight_decay=0.05,
        head_epochs=1,
        ema=0.998,
        augment="crop+mirror",
        patience=8,
    ),
    "report": FitConfig(
        epochs=10,
        batch_size=8,
        optimizer="adam",
        learning_rate=1e-4,
        schedule="constant",
        weight_decay=0.0,
        trunk_rate=1.0,
        label_smoothing=0.0,
        augment="eightfold",
    ),
}
"""What the training options of `train` start from."""


def suited_learning_rate(model: ModelConfig, optimizer: str) -> float:
    """A learning rate to start from, where none is given: the smallest for a whole network that no batch norm holds
    together, as vgg16, or that, as far as its name tells, may be such a one, as vit_b_16."""
    if model.backbone == "cnn_bn":
        rate = 3e-3
    elif model.frozen or _has_batch_norm(model.backbone):
        rate = 1e-3
    else:
        rate = 1e-4
    return 20 * rate if optimizer == "sgd" else rate


def _has_batch_norm(backbone: str) -> bool:
    named = any(part in backbone for part in NORMALISED)
    return named and not any(part in backbone for part in NORMALISED_OTHERWISE)


def suited(model: ModelConfig, fit: FitConfig) -> FitConfig:
    """`fit`, with a learning rate that suits `model` if it had none, and in stages only where there is a trunk that has
    learned before and goes on learning.

    Raises:
        UsageError: `model` cannot be trained so.
    """
    fits = fit.train_size is None or not (model.frozen or model.backbone in ("mlp", "cnn"))
    require(fits, "train_size", fit.train_size, "mlp, cnn and frozen backbones see photos of one size only")
    rate = fit.learning_rate or suited_learning_rate(model, fit.optimizer)
    staged = not model.frozen and model.weights != "none"
    head_epochs = min(fit.head_epochs, fit.epochs - 1) if staged else 0
    trunk_rate = fit.trunk_rate if staged else 1.0
    return dataclasses.replace(fit, learning_rate=rate, head_epochs=head_epochs, trunk_rate=trunk_rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """Search backbones and hyperparameters with Ray Tune; write `trials.parquet` and `best.json`."""

    index: str
    """What `prepare` wrote: its folder, or the index.parquet itself."""
    out: str
    """Folder or s3:// prefix for the results. The same command again goes on where a broken run stopped."""
    preset: Literal["quick", "full", "report"] = "quick"
    """What all other options start from; those given win.
    - quick: the defaults shown here
    - full: more backbones, frozen and whole, and more of everything to draw from
    - report: the report's own sweeps of its small network, and its comparison of backbones"""
    search: Literal["random", "optuna", "grid", "sweep"] = "random"
    """Which trials to run.
    - random: draws, the networks in turn
    - optuna: draws that learn from those before (pip install fruitray[optuna])
    - grid: every combination
    - sweep: the first of every list together; then one list varied at a time; then the other networks, unvaried"""
    trials: int = 8
    """How many to run; grid and sweep run all they have."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops the weaker trials early."""
    folds: int = 0
    """Cross-validate each trial: train it so many times, each time without another part of the photos; needs no
    scheduler. 0: one split, the index's own."""
    backbones: tuple[str, ...] = ("cnn_bn", "mobilenet_v2", "efficientnet_b2")
    """Backbones to compare."""
    weights: str = "imagenet"
    """As for `train`; a folder serves all backbones."""
    frozen_choices: tuple[bool, ...] = (True,)
    """Whether pretrained backbones are frozen; give `True False` to compare both."""
    hidden: int | None = None
    """As for `train`."""
    learning_rates: tuple[float, ...] = ()
    """To choose from; random and optuna draw between the least and the greatest. When not given: --learning-rate alone,
    or, without that, what suits the network, up to three times more, and down to a third."""
    batch_sizes: tuple[int, ...] = ()
    """To choose from; --batch-size alone when not given."""
    dropouts: tuple[float, ...] = ()
    """To choose from; the backbone's own alone when not given."""
    image_size: int | None = None
    """As for `train`."""
    crop: float | None = None
    """As for `train`."""
    fit: FitConfig = FitConfig(epochs=10)
    cpus_per_trial: float = 1
    """CPUs reserved for each trial."""
    gpus_per_trial: float = 0
    """GPUs reserved for each trial; a fraction lets several share one."""
    config: str | None = None
    """As for `prepare`."""
    report: bool = True
    """As for `prepare`."""
    dry_run: bool = False
    """As for `prepare`."""

    def __post_init__(self) -> None:
        require(len(self.backbones) >= 1, "backbones", self.backbones, "name at least one")
        require(self.trials >= 1, "trials", self.trials, "must be at least 1")
        require(self.folds == 0 or self.folds >= 2, "folds", self.folds, "must be 2 at least, or 0")
        _require_number("hidden", self.hidden)
        for rate in self.learning_rates:
            _require_positive("learning_rates", rate)
        require(all(size >= 1 for size in self.batch_sizes), "batch_sizes", self.batch_sizes, "all at least 1")
        require(all(0 <= share < 1 for share in self.dropouts), "dropouts", self.dropouts, "all must lie in [0, 1)")
        _require_view(self.image_size, self.crop)
        require(len(self.frozen_choices) >= 1, "frozen_choices", self.frozen_choices, "give True, False or both")
        for name, share in (("cpus_per_trial", self.cpus_per_trial), ("gpus_per_trial", self.gpus_per_trial)):
            _require_number(name, share)
            require(share == round(share, 4), name, share, "Ray divides into ten thousandths at most")
        _require_positive("cpus_per_trial", self.cpus_per_trial)
        whole = self.gpus_per_trial <= 1 or self.gpus_per_trial == int(self.gpus_per_trial)
        require(whole, "gpus_per_trial", self.gpus_per_trial, "above 1 it must be a whole number")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train the final model with Ray Train; write the model package."""

    index: str
    """What `prepare` wrote: its folder, or the index.parquet itself."""
    out: str
    """Folder or s3:// prefix for the package. The same command again resumes a broken run."""
    config: str | None = None
    """The best.json of `tune`, or any other file as for `prepare`: what the options start from; those given win."""
    recipe: Recipe = "suited"
    """What the training options start from; those of --config win, and those given.
    - head: for a frozen backbone
    - whole: for a whole network: its head first, then all of it at lower rates, random crops, an average of the weights
    - report: as the report trained
    - suited: the first or the second, as --frozen says"""
    model: ModelConfig = ModelConfig()
    fit: FitConfig = FitConfig()
    tta: bool = False
    """Test-time augmentation: average over each photo and its mirror image, when the final model is evaluated and, as
    the package says so, when it scores. Twice the work; what it brings is measured."""
    coverage: float = 0.95
    """Share of the validation photos that the package's confidence threshold lets pass: photos below it may show none
    of the classes."""
    workers: int = 1
    """Data-parallel workers; what is learned does not depend on their number, but for what drops out at random."""
    gpu: bool = False
    """Give each worker one GPU."""
    checkpoint_minutes: float = 5.0
    """Save a checkpoint when this time has passed, in the middle of an epoch too, and after each epoch unless that took
    much time; a run that is broken off loses no more than what came after its last one."""
    report: bool = True
    """As for `prepare`."""
    dry_run: bool = False
    """As for `prepare`."""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", self.workers, "must be at least 1")
        _require_number("checkpoint_minutes", self.checkpoint_minutes)
        require(0 < self.coverage <= 1, "coverage", self.coverage, "must lie in (0, 1]")
        if isinstance(self.index, str):  # else the command line starts from this, and the backbone is still to come
            object.__setattr__(self, "fit", suited(self.model, self.fit))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """Score photos with a model package: one Parquet row per input, exactly once."""

    package: str
    """What `train` wrote."""
    images: tuple[str, ...]
    """Folders or s3:// prefixes, every file below which is an input; or lists: .parquet or .csv files with a column
    `uri` (and perhaps `label`, `etag`, `bytes`), such as an index."""
    split: Literal["train", "val", "test"] | None = None
    """Of indexes, only the photos of this split, as those that `prepare --test-fraction` keeps from all training."""
    out: str
    """Folder or s3:// prefix for data/part-*.parquet, manifest.json and _SUCCESS. The same command again resumes."""
    top_k: int = 3
    """How many labels and scores each row lists."""
    embeddings: bool = False
    """Add what the network's head sees of each photo, as a column `embedding`."""
    partition_by: Literal["nothing", "folder"] = "nothing"
    """Write data/folder=NAME/part-*.parquet, by the first folder of each photo, or by the `label` of a list."""
    shard_rows: int = 0
    """Rows per Parquet file at most: the unit of work, commit and resume; 0 takes what keeps all workers busy to the
    end, from 32 to 4096."""
    batch_size: int = 0
    """Photos per forward pass; 0 takes what suits the device."""
    engine: Literal["auto", "eager", "compile", "openvino"] = "auto"
    """What computes: plain PyTorch, torch.compile, or OpenVINO (extra, for CPUs); auto takes the quickest for so many
    photos of those that are installed."""
    full_precision: bool = False
    """Compute in float32 where bfloat16 is quicker, too."""
    workers: int = 0
    """Scoring processes; 0 takes one per CPU of the cluster, or one per GPU with --gpu."""
    gpu: bool = False
    """Give each worker one GPU, and its share of the CPUs to decode for it."""
    max_error_rate: float = 1.0
    """Exit 4 when a larger share of the photos is bad; every row is written all the same."""
    cost_per_hour: float | None = None
    """What the cluster costs, in any currency: the summary then says what 1,000 photos cost."""
    previous: str | None = None
    """An earlier output of the same model: rows of photos that have not changed since are taken from there, as of a
    folder that has grown."""
    retry_errors: bool = False
    """With --previous: score again what was an error there."""
    config: str | None = None
    """As for `prepare`."""
    report: bool = True
    """As for `prepare`."""
    dry_run: bool = False
    """As for `prepare`; and score some photos, and say how long all would take."""

    def __post_init__(self) -> None:
        require(len(self.images) > 0, "images", self.images, "must name at least one place")
        require(self.top_k >= 1, "top_k", self.top_k, "must be at least 1")
        _require_number("shard_rows", self.shard_rows)
        _require_number("batch_size", self.batch_size)
        _require_number("workers", self.workers)
        require(0 <= self.max_error_rate <= 1, "max_error_rate", self.max_error_rate, "must lie in [0, 1]")
        _require_number("cost_per_hour", self.cost_per_hour)
        retry = self.retry_errors
        require(not retry or self.previous is not None, "retry_errors", retry, "needs --previous, the output with them")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a model package as ONNX or torch.export; checked on photos against the package's own answers."""

    package: str
    """What `train` wrote."""
    out: str
    """Folder or s3:// prefix for the exported model, `model.onnx` or `model.pt2`, and `export.json`, which says what
    goes in, what comes out, and how exactly it answers as the package does."""
    format: Literal["onnx", "torch"] = "onnx"
    """What to write; both take batches of any size.
    - onnx: model.onnx, one file, for ONNX Runtime and others (pip install fruitray[export])
    - torch: model.pt2, for torch.export.load"""
    images: str | None = None
    """Folder or s3:// prefix of photos to check it on; some of them are taken. When not given, drawn ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Prove a scored output: every planned input has exactly one row, and every file is what the manifest says."""

    out: str
    """What `score` wrote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Draw what jobs have written as one page of HTML that needs nothing else."""

    runs: tuple[str, ...]
    """What jobs wrote, or folders of that; what it was made from comes along."""
    out: str | None = None
    """Folder or s3:// prefix for `report.html`; the first of --runs when not given."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "runs", self.runs, "must name at least one place")


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Say what this machine has for the jobs, and whether they reach what they need."""

    places: tuple[str, ...] = ()
    """Folders or s3:// prefixes to look at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """All of it on this machine, nothing needed: drawn photos, a local S3 server, a local Ray."""

    out: str = "demo-output"
    """Local folder; each run gets a folder of its own in it."""
    per_class: int = 200
    """Photos to draw for each of the three classes."""
    trials: int = 4
    """Tune trials to run."""
    epochs: int = 12
    """At most so many epochs for each trial and for the final model."""
    image_size: int = 64
    """Side in pixels of what the networks see."""

    def __post_init__(self) -> None:
        require("://" not in self.out, "out", self.out, "must be a local folder")
        require(self.per_class >= 20, "per_class", self.per_class, "must be at least 20")
        require(self.trials >= 1, "trials", self.trials, "must be at least 1")
        require(self.epochs >= 1, "epochs", self.epochs, "must be at least 1")
        _require_side("image_size", self.image_size)


PLACES = ("config", "images", "index", "out", "package", "places", "previous", "runs", "weights")
"""The options that name a place in storage."""


def resolved(config: Any) -> Any:
    """`config` with its places written in one way: local paths absolute, as workers run in folders of their own.

    Raises:
        UsageError: one is empty, as where a variable of the shell is, or no text.
    """
    changes = {}
    for name in (field.name for field in dataclasses.fields(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            changes[name] = resolved(value)
        elif name in PLACES and isinstance(value, tuple):
            changes[name] = tuple(_in_one_way(name, place) for place in value)
        elif name in PLACES and value is not None and not (name == "weights" and value in ("imagenet", "none")):
            changes[name] = _in_one_way(name, value)
    return dataclasses.replace(config, **changes)


def _in_one_way(name: str, place: str) -> str:
    scheme, separator, rest = place.partition("://")
    if separator and scheme != "file":
        place = f"{scheme}://{rest.rstrip('/')}"
    else:
        path = unquote(rest) if separator else place
        require(path != "", name, repr(place), "must name a place")
        place = os.path.abspath(os.path.expanduser(path))
    shown = os.fsencode(place).decode(errors="backslashreplace")
    require(shown == place, name, shown, "its name is not UTF-8: rename it")
    return place


def to_json(config: Any, **more: str) -> bytes:
    """The config, and what `more` there is to say, as indented JSON with sorted keys, to be kept beside the output."""
    return json.dumps({**dataclasses.asdict(config), **more}, indent=2, sort_keys=True).encode()
