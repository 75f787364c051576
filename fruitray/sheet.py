"""`augment.png`: some training photos, and beside each what an augmentation makes of it."""

import io

import torch

from fruitray.augment import contact_sheet
from fruitray.batches import squares
from fruitray.index import Index
from fruitray.preprocess import Preprocessing
from fruitray.storage import Storage, open_storage

FILE = "augment.png"


def write_sheet(out: Storage, index: Index, policy: str, seed: int, *, photos: int, side: int) -> None:
    """Draw `photos` training photos, evenly from all, `side` pixels wide, and what becomes of them, into `out`.

    Raises:
        OutputConflictError: a photo is no longer what the index says.
    """
    entries, _ = index.rows("train")
    count = min(photos, len(entries))
    chosen = [entries[place * len(entries) // count] for place in range(count)]
    shown = torch.stack(list(squares(open_storage(index.images), chosen, Preprocessing(size=side))))
    sheet = io.BytesIO()
    contact_sheet(shown, policy, seed).save(sheet, "PNG")
    out.write(FILE, sheet.getvalue())
