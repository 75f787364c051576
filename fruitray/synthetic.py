"""Draws labelled fruit photos for the demo and the tests, so that neither needs a download.

Here: `draw`, one picture of cherries, strawberries or tomatoes; `photo_set`, a folder's worth of JPEG files with
the faults of a real collection. Not here: finding those faults (`audit`), decoding (`images`), writing (`storage`).

The classes share skins, light and backgrounds; shape, seeds, stalks and calyx tell them apart. A scene is drawn at
twice the photo's size and halved. A place is a complex number x + iy, y down: in canvas pixels, or local to a fruit,
in its radii with the stalk end at -i. Colours are RGB, 0 to 255.
"""

import colorsys
import io
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.floating]
Places = NDArray[np.complexfloating]
Place = TypeVar("Place", complex, Places)
Range = tuple[float, float]

LABELS: tuple[str, ...] = ("cherry", "strawberry", "tomato")

_OUTLIER_SIZES = ((240, 320), (500, 333), (200, 200), (333, 500), (320, 240), (180, 270), (400, 400))  # (width, height)
_RIM: Places = np.exp(1j * np.radians(np.arange(360)))  # (360,) the unit circle by degree
_STALK_END = np.exp(-(((np.arange(360) - 270) / 22) ** 2))  # (360,) 1 at the stalk end of an outline, 0 elsewhere
_GREENS = ((0.19, 0.34), (0.40, 0.75), (0.38, 0.72))  # ranges of hue, saturation and value, as in the next two
_ANY = ((0.0, 1.0), (0.0, 0.65), (0.15, 1.0))
_SKINS = (
    ((-0.030, 0.030), (0.78, 0.96), (0.62, 0.95)),  # ripe
    ((-0.060, 0.000), (0.70, 0.90), (0.28, 0.50)),  # dark
    ((0.055, 0.140), (0.70, 0.92), (0.75, 0.98)),  # orange and yellow
    ((0.180, 0.270), (0.45, 0.72), (0.55, 0.80)),  # unripe
)


def draw(label: str, seed: int, size: tuple[int, int] = (300, 300)) -> Image.Image:
    """One RGB photo of `size` (width, height) px; (label, seed, size) and Pillow's and numpy's releases fix it."""
    if label not in LABELS:
        raise ValueError(f"label={label!r}: must be one of {', '.join(LABELS)}")
    rng = np.random.default_rng([LABELS.index(label), seed])
    canvas = _background(rng, size).resize((2 * size[0], 2 * size[1]), Image.Resampling.BILINEAR)
    light = rng.uniform(0.35, 0.85) * np.exp(1j * rng.uniform(0, 2 * np.pi))
    scene = _Scene(rng=rng, canvas=canvas, pen=ImageDraw.Draw(canvas, "RGBA"), unit=min(canvas.size), light=light)
    for _ in range(rng.choice(3, p=(0.7, 0.2, 0.1))):  # stray leaves, so that green alone says nothing
        base, turn = complex(*rng.uniform(0, 1, 2) * canvas.size), np.exp(1j * rng.uniform(0, 7))
        _leaf(scene, base, base + turn * rng.uniform(0.2, 0.5) * scene.unit, 0.25, _tint(rng, *_GREENS))
    {"cherry": _cherries, "strawberry": _strawberries, "tomato": _tomatoes}[label](scene)
    return _expose(rng, canvas.reduce(2))


def photo_set(per_class: int, seed: int = 0) -> dict[str, bytes]:
    """`per_class` JPEG files per class by name ("cherry/cherry_0000.jpg"), sorted; the same arguments, the same bytes.

    Photos are 300x300 px at qualities 75 to 95. Per class, n/75 (20 in the report's 1,500) have another size, n/50
    repeat another file byte for byte and n/50 nearly repeat one, at least one of each. In the whole set one file is
    greyscale (strawberry) and two do not decode: half a JPEG (cherry) and random bytes (tomato).
    """
    if per_class < 8:
        raise ValueError(f"per_class={per_class}: must be 8 or more, to hold one fault of each kind")
    folders = {label: _class_files(label, per_class, seed) for label in LABELS}
    files = {f"{label}/{label}_{i:04d}.jpg": data for label in LABELS for i, data in enumerate(folders[label])}
    return dict(sorted(files.items()))


def _class_files(label: str, count: int, seed: int) -> list[bytes]:
    rng = np.random.default_rng([LABELS.index(label), count, seed])
    outliers, twins = max(1, round(count / 75)), max(1, count // 50)
    sizes = [_OUTLIER_SIZES[i] for i in rng.integers(len(_OUTLIER_SIZES), size=outliers)]
    sizes += [(300, 300)] * (count - outliers - 2 * twins - 1)
    shots = [(int(rng.integers(2**62)), size, int(rng.integers(75, 96))) for size in sizes]
    files = [_jpeg(draw(label, photo, size), quality) for photo, size, quality in shots]
    files += files[-twins:]
    files += [_near_copy(rng, draw(label, photo, size), quality) for photo, size, quality in shots[-2 * twins : -twins]]
    odd = _jpeg(draw(label, int(rng.integers(2**62))).convert("L" if label == "strawberry" else "RGB"), 90)
    files.append({"cherry": odd[: len(odd) // 2], "strawberry": odd, "tomato": rng.bytes(6000)}[label])
    return [files[i] for i in rng.permutation(count)]


def _near_copy(rng: np.random.Generator, image: Image.Image, quality: int) -> bytes:
    """The drawing at another JPEG quality, every other time trimmed by up to 3 % a side and resized back."""
    left, top, right, bottom = rng.integers(2, 10, size=4).tolist() if rng.random() < 0.5 else (0, 0, 0, 0)
    trimmed = image.resize(image.size, box=(left, top, image.width - right, image.height - bottom))
    return _jpeg(trimmed, 75 + (quality - 65) % 21)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scene:
    """What everything in one photo shares: `unit` is the canvas's shorter side, `light` a heading shorter than 1."""

    rng: np.random.Generator
    canvas: Image.Image
    pen: ImageDraw.ImageDraw
    unit: float
    light: complex

    def middle(self) -> complex:
        return complex(*self.canvas.size) / 2 + complex(*self.rng.uniform(-0.14, 0.14, 2)) * self.unit

    def heap(self, largest: float) -> list[tuple[complex, float]]:
        """Centres and radii of one to three fruits that nearly touch, the radius up to `largest` units."""
        count = int(self.rng.choice([1, 2, 3], p=(0.5, 0.3, 0.2)))
        radius = self.rng.uniform(0.6, 1) * largest * self.unit / (1, 1.3, 1.55)[count - 1]
        turns = self.rng.uniform(0, 7) + np.arange(count) * 2 * np.pi / count
        centres = self.middle() + radius * 0.95 * (count > 1) * np.exp(1j * turns)
        return [(complex(centre), radius * self.rng.uniform(0.85, 1.1)) for centre in centres]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Body:
    """Where one fruit lies: centre and radius in pixels, turn in radians, outline (360,) local radii by degree."""

    centre: complex
    radius: float
    turn: float
    outline: Floats

    def place(self, local: Place) -> Place:
        return self.centre + local * complex(self.radius * np.exp(1j * self.turn))


def _cherries(scene: _Scene) -> None:
    rng, skin, green = scene.rng, _skin(scene.rng), _tint(scene.rng, *_GREENS)
    count, radius = int(rng.choice([1, 2, 3], p=(0.25, 0.5, 0.25))), rng.uniform(0.12, 0.21) * scene.unit
    turn, reach = rng.uniform(-0.9, 0.9) + np.pi * (rng.random() < 0.12), rng.uniform(2.4, 3.6)  # stalks, in radii
    node = scene.middle() - 0.62j * reach * radius * np.exp(1j * turn)
    if rng.random() < 0.3:
        _leaf(scene, node, node + np.exp(1j * rng.uniform(0, 7)) * radius * rng.uniform(1.6, 2.6), 0.27, green)
    for lean in (np.arange(count) - (count - 1) / 2) * rng.uniform(1.5, 2.3) / reach + rng.uniform(-0.1, 0.1, count):
        centre = node + 1j * np.exp(1j * (turn - lean)) * radius * reach * rng.uniform(0.88, 1.12)
        outline = 1 + rng.uniform(0, 0.04) * _RIM.real**2 - 0.09 * _STALK_END
        body = _Body(centre=centre, radius=radius * rng.uniform(0.9, 1.1), turn=turn - lean, outline=outline)
        _paint(scene, body, skin, gloss=(90, rng.uniform(0.55, 0.95)))
        _leaf(scene, body.place(-0.8j), node, 0.026, green, point=0)
    scene.pen.circle((node.real, node.imag), 0.13 * radius, fill=_ink(green, 0.75))


def _strawberries(scene: _Scene) -> None:
    rng = scene.rng
    skin, green, seed = _skin(rng), _tint(rng, *_GREENS), _tint(rng, (0.1, 0.16), (0.3, 0.6), (0.85, 0.95))
    for centre, radius in scene.heap(0.40):
        turn = rng.normal(0, 0.75) + np.pi * (rng.random() < 0.15)
        body = _Body(centre=centre, radius=radius, turn=turn, outline=_cone(rng))
        _paint(scene, body, skin, gloss=(14, rng.uniform(0.12, 0.35)))
        _seeds(scene, body, seed)
        _rosette(scene, body, -0.8j, leaves=9, girths=(0.2, 0.09), green=green)


def _tomatoes(scene: _Scene) -> None:
    rng, skin, green = scene.rng, _skin(scene.rng), _tint(scene.rng, *_GREENS)
    ribs = int(rng.integers(5, 9)) if rng.random() < 0.4 else 0
    for centre, radius in scene.heap(0.42):
        above = rng.uniform(0, 1)  # 0: seen from the side, 1: from the stalk's end
        flat = 1 / np.abs(_RIM.real + 1j * _RIM.imag / (rng.uniform(0.76, 0.9) * (1 - above) + above))
        lobes = 0.06 * np.abs(np.sin(ribs / 2 * np.angle(_RIM))) - 0.05 * _STALK_END * (1 - above)
        body = _Body(centre=centre, radius=radius, turn=rng.normal(0, 0.6), outline=flat + lobes)
        _paint(scene, body, skin, gloss=(22, rng.uniform(0.25, 0.55)), ribs=ribs)
        calyx = complex(rng.uniform(-0.15, 0.15), 0.5 * above - 0.6)
        _rosette(scene, body, calyx, leaves=6, girths=(0.1, 0.16), green=green)


def _cone(rng: np.random.Generator) -> Floats:
    """(360,) a cone or heart: broad shoulders, the tip opposite the stalk end."""
    x = rng.uniform(0.68, 0.88) * _RIM.imag * (1 - rng.uniform(0.3, 0.48) * _RIM.real)
    y = _RIM.real + rng.uniform(0, 0.25) * np.roll(_STALK_END, -90) + 0.1 * _RIM.real**2 - 0.05
    return np.interp(np.angle(_RIM), np.arctan2(y, x), np.hypot(x, y), period=2 * np.pi)


def _paint(scene: _Scene, body: _Body, skin: Floats, gloss: Range, ribs: int = 0) -> None:
    """Shades a body as if it bulged to a half sphere; `skin` (2, 3), `gloss` the highlight's sharpness and strength."""
    edge, away = body.place(body.outline * _RIM), body.radius * (scene.light * 0.25)
    for grow in np.linspace(0.85, 1.2, 10):  # a soft shadow
        scene.pen.polygon(_path(body.centre + (edge - body.centre) * grow - away), fill=(8, 6, 10, 22))
    half = max(2, int(body.radius * 0.66))  # the shading is smooth: one value serves 2 x 2 canvas pixels
    axis = (np.arange(-half, half, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / body.radius)
    grid = axis + 1j * axis[:, None]  # (H, W) local, not turned
    degree = np.degrees(np.angle(grid)) - np.float32(np.degrees(body.turn))
    flat = grid / body.outline.astype(np.float32)[degree.astype(np.int32) % 360]
    bulge = np.sqrt(np.clip(1 - flat.real**2 - flat.imag**2, 0, 1))  # the surface faces (flat, bulge)
    lift = np.float32(np.sqrt(1 - abs(scene.light) ** 2))
    facing = flat.real * np.float32(scene.light.real) + flat.imag * np.float32(scene.light.imag) + lift * bulge
    tone = 0.34 + 0.72 * np.clip(facing, 0, 1) * (0.8 + 0.2 * bulge)
    if ribs:
        tone *= 1 - 0.25 * (1 - bulge) * np.cos(np.radians(degree) * ribs / 2) ** 8
    shine = 255 * gloss[1] * np.clip((facing + bulge) / np.sqrt(2 + 2 * lift), 0, 1) ** gloss[0]
    blush = np.clip(0.45 + 0.6 * (flat * np.complex64(np.exp(1j * scene.rng.uniform(0, 7)))).real, 0, 1)[..., None]
    colour = (skin[0] + (skin[1] - skin[0]) * blush) * tone[..., None] + shine[..., None]
    patch = _image(colour).resize((4 * half, 4 * half), Image.Resampling.BILINEAR)
    left, top = round(body.centre.real) - 2 * half, round(body.centre.imag) - 2 * half
    mask = Image.new("L", patch.size)
    ImageDraw.Draw(mask).polygon(_path(edge - complex(left, top)), fill=255)
    scene.canvas.paste(patch, (left, top), mask)


def _seeds(scene: _Scene, body: _Body, colour: Floats) -> None:
    """Pale drops in dark pits, in staggered rows that close up towards the edge, as on a round body."""
    rng, edge = scene.rng, body.outline * _RIM
    for row, y in enumerate(np.linspace(-0.68, 0.86, int(rng.integers(7, 10)))):
        width = np.abs(edge.real[np.argsort(np.abs(edge.imag - y))[:4]]).max()
        step = 0.26 / max(width, 0.15)
        for swing in np.arange(-1.25, 1.25, step) + step / 2 * (row % 2) + rng.uniform(-0.05, 0.05):
            circle = _RIM[::45].real * max(np.cos(swing), 0.4) + 1.6j * _RIM[::45].imag
            seed = width * np.sin(swing) + 1j * (y + rng.uniform(-0.02, 0.02))
            scene.pen.polygon(_path(body.place(seed + 0.042 * circle)), fill=(60, 0, 0, 90))
            scene.pen.polygon(_path(body.place(seed + 0.026 * circle)), fill=_ink(colour))


def _rosette(scene: _Scene, body: _Body, at: complex, leaves: int, girths: Range, green: Floats) -> None:
    """Up to `leaves` sepals and a short stalk around the local place `at`, foreshortened towards the body's edge."""
    rng, squeeze, leaves = scene.rng, np.sqrt(max(0.2, 1 - at.imag**2)), leaves - int(scene.rng.integers(2))
    for turn in (np.arange(leaves) + rng.uniform(-0.2, 0.2, leaves)) * 2 * np.pi / leaves + rng.uniform(0, 7):
        reach = complex(np.cos(turn), np.sin(turn) * squeeze) * rng.uniform(0.42, 0.65)
        _leaf(scene, body.place(at), body.place(at + reach), girths[0], green * rng.uniform(0.8, 1.15))
    _leaf(scene, body.place(at), body.place(at + rng.uniform(-0.25, 0.25) - 0.42j), girths[1], green, point=0)


def _leaf(scene: _Scene, base: complex, tip: complex, girth: float, green: Floats, point: int = 1) -> None:
    """A leaf `girth` times its length to each side, one side in the shade; a stalk of even width if `point` is 0."""
    along = np.linspace(0, 1, 13)
    spine = base + (tip - base) * (along + 1j * scene.rng.uniform(-0.6, 0.6) * along * (1 - along))
    across, drop = np.gradient(spine), scene.light * abs(tip - base) * 0.03
    bulge = 1j * across / np.abs(across) * abs(tip - base) * girth * np.sin(np.pi * along**0.8) ** point
    scene.pen.polygon(_path(np.concatenate([spine + bulge, (spine - bulge)[::-1]]) - drop), fill=(0, 0, 0, 70))
    for side, tone in ((1, 1.0), (-1, 0.68)):
        scene.pen.polygon(_path(np.concatenate([spine, (spine + side * bulge)[::-1]])), fill=_ink(green, tone))
    scene.pen.line(_path(spine), fill=_ink(green, 1.25), width=max(1, int(abs(tip - base) * girth * 0.1)))


def _path(places: Places) -> list[float]:
    return [*np.stack([places.real, places.imag], 1).ravel().tolist()]  # x and y by turns


def _tint(rng: np.random.Generator, hue: Range, saturation: Range, value: Range) -> Floats:
    hsv = rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value)
    return np.array(colorsys.hsv_to_rgb(*hsv), np.float32) * np.float32(255)


def _ink(colour: Floats, tone: float = 1.0) -> tuple[int, int, int]:
    red, green, blue = (int(min(255.0, part * tone)) for part in colour.tolist())
    return red, green, blue


def _skin(rng: np.random.Generator) -> Floats:
    """(2, 3) a fruit's colour and that of its other side, seldom of another ripeness."""
    first, other = rng.choice(len(_SKINS), size=2, p=(0.6, 0.14, 0.14, 0.12))
    return np.stack([_tint(rng, *_SKINS[first]), _tint(rng, *_SKINS[other if rng.random() < 0.25 else first])])


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """RGB of `size`: a plain wall, wood, checked cloth, grass or blurred lights."""
    kind = rng.choice(["wall", "wood", "cloth", "grass", "lights"], p=(0.3, 0.2, 0.2, 0.15, 0.15))
    x, y = np.linspace(-0.5, 0.5, size[0], dtype=np.float32), np.linspace(-0.5, 0.5, size[1], dtype=np.float32)
    grid = (x + 1j * y[:, None]) * np.complex64(np.exp(1j * rng.uniform(0, 7)))
    first = _tint(rng, *{"wood": ((0.04, 0.1), (0.25, 0.65), (0.35, 0.9)), "grass": _GREENS}.get(kind, _ANY))
    second, share = first * rng.uniform(0.45, 1.1), 0.5 + 0.75 * grid.real
    if kind == "wood":
        rings, planks = grid.real * rng.uniform(70, 150), np.abs(grid.real * rng.uniform(3, 6) % 1 - 0.5)
        share = 0.4 + 0.3 * np.sin(rings + 3 * np.sin(grid.imag * 5)) * np.cos(grid.real * 23) + (planks > 0.485)
    elif kind == "cloth":
        second, threads = np.full(3, rng.uniform(200, 250), np.float32), grid * rng.uniform(5, 14)
        share = (threads.real % 1 < 0.5) * np.float32(0.5) + (threads.imag % 1 < 0.5) * np.float32(0.5)
    image = _image(first + (second - first) * np.clip(share, 0, 1)[..., None])
    return {"grass": _blades, "lights": _lights}.get(kind, lambda _, plain: plain)(rng, image)


def _blades(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    pen, green = ImageDraw.Draw(image), _tint(rng, *_GREENS)
    roots = rng.uniform(-0.05, 1.05, (400, 2)) * image.size
    tips = roots + rng.normal((0, -0.09), (0.03, 0.03), (400, 2)) * image.height
    for ends, tone in zip(np.concatenate([roots, tips], 1).tolist(), rng.uniform(0.35, 1.3, 400), strict=True):
        pen.line(ends, fill=_ink(green, tone), width=max(1, image.width // 120))
    return image


def _lights(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    pen, unit = ImageDraw.Draw(image, "RGBA"), min(image.size)
    for x, y in rng.uniform(0, 1, (rng.integers(10, 26), 2)) * image.size:
        colour = (*_ink(_tint(rng, (-0.05, 0.35), (0.5, 0.8), (0.8, 1))), int(rng.uniform(60, 170)))
        pen.circle((x, y), rng.uniform(0.03, 0.13) * unit, fill=colour)
    return image.filter(ImageFilter.BoxBlur(0.02 * unit))


def _expose(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """The camera: focus, exposure, white balance and sensor noise."""
    blur = rng.uniform(0, 0.5) if rng.random() < 0.8 else rng.uniform(0.8, 1.8)  # px in a photo of 300
    image = image.filter(ImageFilter.BoxBlur(blur * min(image.size) / 300))
    gain = (rng.uniform(0.6, 1.35) * rng.uniform(0.9, 1.1, 3)).astype(np.float32)
    noise = rng.standard_normal((image.height, image.width, 1), np.float32) * np.float32(rng.uniform(0, 11))
    return _image(np.asarray(image, np.float32) * gain + noise)


def _image(pixels: Floats) -> Image.Image:
    """RGB from (H, W, 3)."""
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
