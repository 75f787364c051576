"""An index and a config -> what one training run needs: the model, the part of it that is fitted, its batches."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from fruitray.augment import VARIANTS
from fruitray.backbones import Classifier, freeze
from fruitray.batches import CPU, Batches, decoded_photos, near
from fruitray.config import FitConfig, require
from fruitray.errors import UsageError, one_line
from fruitray.features import features_key, read_features
from fruitray.index import Index
from fruitray.storage import open_storage

VAL_BATCH = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """`fit(recipe.module, recipe.train, recipe.val, ...)` trains `recipe.model`."""

    model: Classifier
    module: nn.Module
    """The whole model over photos, or its head alone over embeddings that are kept beside the index."""
    train: Batches
    val: Batches


def make_recipe(
    index_uri: str,
    index: Index,
    model: Classifier,
    config: FitConfig,
    *,
    frozen: bool,
    validation: torch.Tensor | None = None,
    cached: bool = True,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
) -> Recipe:
    """Load the photos or, where the trunk is `frozen` and the augmentation a fixed set, their embeddings
    (`cluster/embed.py` must have made them; not `cached`: do without); the batches come on `device`. `model` then
    computes as precisely as `config` says.

    `validation`, (N,) bool, says of each photo of the pool whether it is held out; the index's own split when it is not
    given.

    Raises:
        UsageError: a batch is too small to give every worker a photo, or the network takes no photos of `train_size`.
        OutputConflictError: a photo is no longer what the index says.
        NotFoundError: there are no embeddings.
    """
    model.full_precision = config.full_precision
    pool, policy = index.pool(), config.augment
    in_val = torch.tensor(pool.validated)
    held_out = in_val if validation is None else validation
    labels = torch.tensor(pool.labels)
    train_rows, val_rows = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    if frozen:
        freeze(model)
    if config.train_size:
        _require_train_size(model, config.train_size)
    module: nn.Module = model
    if frozen and cached and policy in VARIANTS:
        module = model.head
        embeddings = _embeddings(index_uri, index, model, policy, in_val, validation)
        train_inputs, val_inputs = (near(part, device) for part in embeddings)
        train_labels, val_labels = labels[train_rows].repeat_interleave(len(VARIANTS[policy])), labels[val_rows]
        train_rows, val_rows = torch.arange(len(train_inputs)), torch.arange(len(val_inputs))
        policy = "none"
    else:
        photos = decoded_photos(open_storage(index.images), pool.entries, model.preprocessing)
        train_inputs = val_inputs = near(photos, device)
        train_labels = val_labels = labels
    train = Batches(
        inputs=train_inputs,
        labels=train_labels,
        rows=train_rows,
        classes=len(index.classes),
        batch_size=config.batch_size,
        shuffle=True,
        policy=policy,
        size=config.train_size,
        seed=config.seed,
        rank=rank,
        world=world,
        device=device,
    )
    share = train.examples // len(train) // world
    rule = f"must give each of the {world} workers a photo for each of the {config.accumulate} parts of a step"
    require(share >= (config.accumulate if world > 1 else 1), "batch_size", config.batch_size, rule)
    val = replace(
        train,
        inputs=val_inputs,
        labels=val_labels,
        rows=val_rows,
        batch_size=VAL_BATCH,
        shuffle=False,
        policy="none",
        size=None,
    )
    return Recipe(model, module, train, val)


def _require_train_size(model: Classifier, size: int) -> None:
    side = model.preprocessing.size
    require(size <= side, "train_size", size, f"the network validates at {side}")
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    except (AssertionError, RuntimeError) as error:  # as of one that has a weight for each place in the photo
        raise UsageError(f"--train-size {size}: the network cannot take it: {one_line(error)}") from error


def validation_photos(index: Index, model: Classifier, device: torch.device = CPU) -> Batches:
    """The photos that the index's own split holds out, in its order, where the recipe has their embeddings only.

    Raises:
        OutputConflictError: a photo is no longer what the index says.
    """
    entries, labels = index.rows("val")
    return Batches(
        inputs=decoded_photos(open_storage(index.images), entries, model.preprocessing),
        labels=torch.tensor(labels),
        rows=torch.arange(len(labels)),
        classes=len(index.classes),
        batch_size=VAL_BATCH,
        device=device,
    )


def _embeddings(
    index_uri: str,
    index: Index,
    model: Classifier,
    policy: str,
    in_val: torch.Tensor,
    validation: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(training examples, D) and (held-out photos, D) float32, in pool order; of each training photo all variants."""
    key, variants = features_key(index, model), VARIANTS[policy]
    train = read_features(index_uri, index, key, "train", variants)
    val = read_features(index_uri, index, key, "val", variants[:1] if validation is None else variants)
    if validation is None:
        return train.flatten(0, 1), val[:, 0]
    whole = torch.empty(len(in_val), *train.shape[1:])
    whole[~in_val], whole[in_val] = train, val
    return whole[~validation].flatten(0, 1), whole[validation, 0]
