"""An index and a config -> what one training run needs: the model, the part of it that is fitted, its batches."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from fruitray.augment import VARIANTS
from fruitray.backbones import Classifier, freeze
from fruitray.batches import CPU, Batches, decoded_photos
from fruitray.config import FitConfig, require
from fruitray.features import features_key, read_features
from fruitray.index import Index
from fruitray.storage import open_storage


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
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
) -> Recipe:
    """Load the photos or, where the trunk is `frozen`, their embeddings (`cluster/embed.py` must have made them); the
    batches come on `device`.

    Raises:
        UsageError: a batch is too small to give every worker a photo.
        OutputConflictError: a photo is no longer what the index says.
        NotFoundError: there are no embeddings.
    """
    (train_entries, train_labels), (val_entries, val_labels) = index.rows("train"), index.rows("val")
    policy = config.augment
    if frozen:
        freeze(model)
        embeddings = read_features(index_uri, features_key(index, model, policy))
        views = len(VARIANTS[policy])
        cut = len(train_entries) * views
        train_labels = [label for label in train_labels for _ in range(views)]
        train_inputs, val_inputs, policy = embeddings[:cut], embeddings[cut:], "none"
    else:
        storage = open_storage(index.images)
        train_inputs = decoded_photos(storage, train_entries, model.preprocessing)
        val_inputs = decoded_photos(storage, val_entries, model.preprocessing)
    train = Batches(
        inputs=train_inputs,
        labels=torch.tensor(train_labels),
        batch_size=config.batch_size,
        shuffle=True,
        policy=policy,
        classes=len(index.classes),
        seed=config.seed,
        rank=rank,
        world=world,
        device=device,
    )
    everyone = train.examples // len(train) >= world
    require(everyone, "batch_size", config.batch_size, f"must give each of the {world} workers a photo in every step")
    val = replace(train, inputs=val_inputs, labels=torch.tensor(val_labels), shuffle=False, policy="none")
    return Recipe(model, model.head if frozen else model, train, val)
