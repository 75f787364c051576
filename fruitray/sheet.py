"""`augment.png`: some training photos, and beside each what an augmentation makes of it."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fruitray.augment import augment, copies, mix, mixes
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


def contact_sheet(photos: torch.Tensor, policy: str, seed: int = 0, columns: int = 8) -> Image.Image:
    """A picture of `policy`: for each of `photos` (N, 3, H, W) uint8 one row, which starts with the photo itself.

    Then comes what it becomes in epochs 1..`columns`, or in its eight variants where `policy` starts with `eightfold`;
    where the policy mixes, it is mixed with the next row's.
    """
    numbers, each, rows = np.arange(len(photos)), copies(policy), [photos]
    for column in range(columns if each == 1 else each):
        epoch, examples = (column + 1, numbers) if each == 1 else (1, numbers * each + column)
        shown = augment(photos, policy, seed, epoch, examples)
        if mixes(policy):
            shown, _ = mix(shown, shown.roll(-1, 0), policy, seed, epoch, examples)
        rows.append(shown)
    sheet = F.pad(torch.stack(rows, 1), (0, 2, 0, 2), value=255)  # (N, columns + 1, 3, H + 2, W + 2)
    return Image.fromarray(sheet.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).cpu().numpy())
