"""verify: prove a scored output. Needs no cluster; it stands here so that every job is found in one place."""

from fruitray.cluster.runtime import open_input
from fruitray.commit import verify
from fruitray.config import VerifyConfig


def run(config: VerifyConfig) -> str:
    """Check plan, parts and manifest against each other; an error says what does not hold."""
    parts = verify(open_input(config.out))
    rows, errors = sum(part.rows for part in parts), sum(sum(part.errors.values()) for part in parts)
    return f"verify: {rows:,} inputs, one row each ({errors} errors), in {len(parts)} parts; all hashes match"
