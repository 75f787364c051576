"""The label audit of `prepare`: embed with a pretrained backbone, ask a linear probe, write `suspects.parquet`."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from fruitray.augment import VARIANTS
from fruitray.backbones import build
from fruitray.cluster.embed import ensure_features, initial_model
from fruitray.cluster.runtime import answer_of, beside_driver, open_output
from fruitray.config import FitConfig, ModelConfig, PrepareConfig
from fruitray.console import SHOWN, say, show_table
from fruitray.features import features_key, read_features
from fruitray.index import read_index
from fruitray.suspects import FILE, rank_suspects, suspects_table, write_suspects

TRUSTED = 2 / 3
"""A probe that agrees with fewer of the labels says little about any of them."""


def try_probe(config: PrepareConfig) -> None:
    """Raise what is wrong with the probe before the photos are read for it."""
    build(_probe_model(config), classes=2)


def find_suspects(config: PrepareConfig) -> None:
    """Rank the labels of the index in `config.out` by how little the probe believes them; show the first ones."""
    out, index = open_output(config.out), read_index(config.out)
    package = initial_model(out, _probe_model(config), index.classes, config.seed)
    ensure_features(config.out, index, package, FitConfig(augment="none"), gpu=config.gpu)
    key = features_key(index, package.model)
    facts = {
        "backbone": config.probe,
        "weights": package.description["initial_weights"]["sha256"],
        "index": index.sha256,
    }
    found = answer_of(beside_driver(_rank).remote(config.out, key, facts, config.seed))
    show_table("labels to look at", found["first"])
    trust = "" if found["agrees"] >= TRUSTED else "; too few for this list to mean much"
    say(
        f"the probe agrees with {found['agrees']:.1%} of the labels{trust}; {found['likely_wrong']:,} are likely "
        f"wrong; those of train and val are ranked in {out.uri_of(FILE)}"
    )


def _probe_model(config: PrepareConfig) -> ModelConfig:
    return ModelConfig(backbone=config.probe or "", weights=config.weights, image_size=config.image_size, frozen=True)


def _rank(out: str, key: str, facts: dict[str, Any], seed: int) -> dict[str, Any]:
    """Write the table; what is to be shown of it."""
    index = read_index(out)
    embedded = pa.concat_tables([index.table.filter(pc.equal(index.table["split"], side)) for side in ("train", "val")])
    groups = pc.coalesce(embedded["group"], embedded["sha256"]).to_numpy(zero_copy_only=False).astype(str)
    labels = embedded["label"].to_pylist()
    embeddings = [read_features(out, index, key, side, VARIANTS["none"])[:, 0] for side in ("train", "val")]
    suspects = rank_suspects(torch.cat(embeddings).numpy(), labels, groups, seed=seed)
    table = suspects_table(suspects, embedded["uri"].to_pylist(), labels)
    write_suspects(open_output(out), table, facts)
    return {
        "first": table.slice(0, SHOWN).to_pylist(),
        "agrees": float((suspects.suggested == labels).mean()),
        "likely_wrong": int(suspects.likely_wrong.sum()),
    }
