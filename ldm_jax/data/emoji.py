"""Scenes of one or two icons of Noto Color Emoji, with captions: "a pig", "a pig left of a car".

Debian's fonts-noto-color-emoji has the font (SIL OFL 1.1; its pictures Apache-2.0), Pillow draws
it. `NAMED` icons are called by their names. `THINGS` train only under the word "thing", `HELD_BACK`
never. Two named icons whose numbers add up to `HELD_OUT` modulo `EVERY` never meet in training, in
neither order: the held-out split is made of these pairs.
"""

import functools
import os
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm_jax import schema

PACKAGE = "fonts-noto-color-emoji"
STRIKE = 109  # the one size of the font's bitmaps
SCALES = (13 / 16, 14 / 16, 15 / 16)  # longer side of an icon over its cell, half of a scene

# name: character, as Unicode calls it
NAMED = {
    "pig": "PIG FACE",
    "cow": "COW FACE",
    "dog": "DOG FACE",
    "cat": "CAT FACE",
    "fox": "FOX FACE",
    "bear": "BEAR FACE",
    "panda": "PANDA FACE",
    "frog": "FROG FACE",
    "penguin": "PENGUIN",
    "owl": "OWL",
    "parrot": "PARROT",
    "turtle": "TURTLE",
    "fish": "TROPICAL FISH",
    "whale": "SPOUTING WHALE",
    "octopus": "OCTOPUS",
    "bee": "HONEYBEE",
    "ladybug": "LADY BEETLE",
    "zebra": "ZEBRA FACE",
    "apple": "RED APPLE",
    "pear": "PEAR",
    "orange": "TANGERINE",
    "lemon": "LEMON",
    "banana": "BANANA",
    "grapes": "GRAPES",
    "strawberry": "STRAWBERRY",
    "pineapple": "PINEAPPLE",
    "kiwi": "KIWIFRUIT",
    "eggplant": "AUBERGINE",
    "carrot": "CARROT",
    "mushroom": "MUSHROOM",
    "burger": "HAMBURGER",
    "pizza": "SLICE OF PIZZA",
    "donut": "DOUGHNUT",
    "cheese": "CHEESE WEDGE",
    "car": "AUTOMOBILE",
    "bus": "BUS",
    "truck": "DELIVERY TRUCK",
    "tractor": "TRACTOR",
    "train": "STEAM LOCOMOTIVE",
    "rocket": "ROCKET",
    "boat": "SAILBOAT",
    "ship": "SHIP",
    "house": "HOUSE BUILDING",
    "castle": "EUROPEAN CASTLE",
    "tree": "EVERGREEN TREE",
    "cactus": "CACTUS",
    "rose": "ROSE",
    "sunflower": "SUNFLOWER",
    "rainbow": "RAINBOW",
    "umbrella": "UMBRELLA WITH RAIN DROPS",
    "football": "SOCCER BALL",
    "drum": "DRUM WITH DRUMSTICKS",
    "piano": "MUSICAL KEYBOARD",
    "guitar": "GUITAR",
    "bell": "BELL",
    "book": "GREEN BOOK",
    "clock": "ALARM CLOCK",
    "phone": "BLACK TELEPHONE",
    "camera": "CAMERA",
    "magnet": "MAGNET",
    "hat": "TOP HAT",
    "crown": "CROWN",
    "jeans": "JEANS",
    "heart": "HEAVY BLACK HEART",
}
THINGS = {
    "tiger": "TIGER FACE",
    "lobster": "LOBSTER",
    "butterfly": "BUTTERFLY",
    "peacock": "PEACOCK",
    "avocado": "AVOCADO",
    "corn": "EAR OF MAIZE",
    "pretzel": "PRETZEL",
    "fries": "FRENCH FRIES",
    "plane": "AIRPLANE",
    "volcano": "VOLCANO",
    "pumpkin": "JACK-O-LANTERN",
    "leaf": "MAPLE LEAF",
    "trophy": "TROPHY",
    "television": "TELEVISION",
    "dress": "DRESS",
    "key": "KEY",
}
HELD_BACK = {
    "robot": "ROBOT FACE",
    "dinosaur": "SAUROPOD",
    "rooster": "ROOSTER",
    "teddy": "TEDDY BEAR",
    "fire": "FIRE",
    "balloon": "BALLOON",
    "gift": "WRAPPED PRESENT",
    "lion": "LION FACE",
}
ICONS = NAMED | THINGS | HELD_BACK
NAMES = tuple(ICONS)
TRAINED = (*NAMED, *THINGS)
SINGLE = 0.25  # share of training scenes with one icon
EVERY, HELD_OUT = 8, 3
"""(i + j) % EVERY == HELD_OUT: an eighth of the pairs, and no icon with itself."""


def is_held_out(left: str, right: str) -> bool:
    """True for a pair of named icons that no training scene shows."""
    if left not in NAMED or right not in NAMED:
        return False
    return (NAMES.index(left) + NAMES.index(right)) % EVERY == HELD_OUT


def held_out_pairs() -> list[tuple[str, str]]:
    """(left, right) of all held-out pairs, in both orders."""
    return [(a, b) for a in NAMED for b in NAMED if is_held_out(a, b)]


def caption(*names: str) -> str:
    """ "a pig", or "a pig left of a car"; an icon without a name of its own is a "thing"."""
    words = ["thing" if name in THINGS else name for name in names]
    return " left of ".join(f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in words)


class EmojiSource:
    """Training: one icon or two, drawn by chance. Held out: the held-out pairs, in mixed order.

    Icons, places, sizes and the ground follow from split and index alone. FileNotFoundError without
    the font, ValueError for another font, and for a size or a number of images that is too small.
    """

    features = frozenset({"image", "caption"})
    num_classes = classes = None

    def __init__(self, config: schema.EmojiConfig, split: str):
        if config.num_images < 1 or config.size < 16 or config.size % 2:
            raise ValueError(
                f"data.source.num_images {config.num_images}, data.source.size {config.size}: use"
                " 1 or more, and an even size of 16 or more"
            )
        self._font, self._size, self._split = config.font, config.size, split
        pairs = held_out_pairs()
        order = np.random.default_rng(0).permutation(len(pairs))
        self._held_out = [pairs[i] for i in order]
        self._length = config.num_images if split == "train" else len(pairs)
        cells(config.font, config.size // 2)  # refuses a wrong font now

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self._split == "train", index))
        names = self._names(index, rng)
        image = scene(names, rng, font=self._font, size=self._size)
        return {"image": image, "caption": caption(*names)}

    def describe(self, index: int) -> str:
        """For messages."""
        return f"emoji {self._split} scene {index}"

    def _names(self, index: int, rng: np.random.Generator) -> tuple[str, ...]:
        if self._split != "train":
            return self._held_out[index]
        if rng.random() < SINGLE:
            return (str(rng.choice(TRAINED)),)
        while True:
            left, right = map(str, rng.choice(TRAINED, 2, replace=False))
            if not is_held_out(left, right):
                return left, right


def scene(
    names: Sequence[str],
    rng: np.random.Generator,
    *,
    font: str = schema.EmojiConfig.font,
    size: int = 32,
) -> np.ndarray:
    """uint8 [size, size, 3]: one icon in the middle, or two side by side, on a pale plain ground.

    `rng` draws the ground, and the place and the size of each icon.
    """
    side, unit = size // 2, size / 32
    drawn = cells(font, side)
    image = np.empty((size, size, 3), np.float32)
    image[:] = rng.integers(200, 256, 3)
    for slot, name in enumerate(names):
        alone = len(names) == 1
        shift_x = rng.integers(-3, 4) if alone else slot * 15 - 7.5 + rng.choice((-0.5, 0.5))
        x = int(np.floor(side / 2 + shift_x * unit))
        y = int(np.floor(side / 2 + rng.integers(-3, 4) * unit))
        icon = drawn[NAMES.index(name), rng.integers(len(SCALES))]
        below = image[y : y + side, x : x + side]
        below += 255 * icon[..., :3] - icon[..., 3:] * below
    return np.rint(image).astype(np.uint8)


@functools.cache
def cells(font: str, side: int) -> np.ndarray:
    """Every icon at every scale in the middle of a cell: float32 [icons, scales, side, side, 4].

    Colours are premultiplied by alpha; both 0..1. Kept for the life of the process.
    """
    drawn = np.zeros((len(ICONS), len(SCALES), side, side, 4), np.float32)
    for i, character in enumerate(ICONS.values()):
        glyph = _glyph(font, unicodedata.lookup(character))
        for k, scale in enumerate(SCALES):
            small = _resized(glyph, round(side * scale))
            h, w = small.shape[:2]
            top, left = (side - h) // 2, (side - w) // 2
            drawn[i, k, top : top + h, left : left + w] = small
    drawn.setflags(write=False)
    return drawn


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    """Means of areas: [h, w, c], the longer of h and w `side`."""
    h, w = (max(1, round(n * side / max(image.shape[:2]))) for n in image.shape[:2])
    channels = (
        Image.fromarray(image[..., c]).resize((w, h), Image.Resampling.BOX)
        for c in range(image.shape[-1])
    )
    return np.stack([np.asarray(c) for c in channels], axis=-1)


def _glyph(font: str, character: str) -> np.ndarray:
    """Float32 [h, w, 4] without transparent borders, colours premultiplied."""
    picture = Image.new("RGBA", (136, 128))
    ImageDraw.Draw(picture).text((0, 0), character, font=_opened(font), embedded_color=True)
    box = picture.getbbox()
    if box is None:
        raise ValueError(
            f"{font}: does not draw {unicodedata.name(character)}; use NotoColorEmoji.ttf of"
            f" Debian's {PACKAGE}"
        )
    rgba = np.asarray(picture.crop(box), np.float32) / 255
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)


@functools.cache
def _opened(font: str) -> ImageFont.FreeTypeFont:
    if not os.path.isfile(font):
        raise FileNotFoundError(
            f"{font}: is not there; install Debian's {PACKAGE} (apt install {PACKAGE}), or give"
            " its NotoColorEmoji.ttf as data.source.font"
        )
    try:
        return ImageFont.truetype(font, STRIKE)
    except OSError as error:
        raise ValueError(
            f"{font}: is no font with bitmaps of {STRIKE} pixels ({error}); use NotoColorEmoji.ttf"
            f" of Debian's {PACKAGE}"
        ) from error
