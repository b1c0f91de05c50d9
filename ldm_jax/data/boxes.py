"""Tokens of boxes with classes, the input of layout models.

As in taming's `objects_bbox.py`, an object is three tokens: its class and the positions of its
upper left and lower right corner on a square grid. The rest of the sequence is padded with the last
id of the vocabulary. Two more tokens at the end give the part of the whole picture that is shown.
"""

import csv
import difflib
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from ldm_jax.runtime import reading

WHOLE = (0.0, 0.0, 1.0, 1.0)
# bits: a class id grows by 1, 2, 4, 8 times the number of classes
MODIFIERS = ("group", "occluded", "depiction", "inside")
SUITCASE = "/m/01s55n"  # the last in the reference's order of OpenImages' classes

# The 80 "things" of COCO 2017 in the order of its annotation files, counted from 0.
_COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush"""
COCO = tuple(name.strip() for name in _COCO.split(","))


class Box(NamedTuple):
    """An object: its class id, with modifiers, and its sides as fractions of the picture."""

    label: int
    left: float
    top: float
    right: float
    bottom: float


def max_objects(max_length: int) -> int:
    """Number of objects that a sequence holds; ValueError if its length is not that of a layout."""
    if max_length < 3 or max_length % 3 == 1:
        raise ValueError(
            f"a text encoder of {max_length} tokens takes no layouts: needed are 3 for each object,"
            " and 0 or 2 more"
        )
    return max_length // 3


def tokenize(
    boxes: Sequence[Box],
    vocab_size: int = 8192,
    max_length: int = 92,
    part: tuple[float, float, float, float] = WHOLE,
) -> np.ndarray:
    """int32 [max_length]: (class, upper left, lower right) of each box, padding, then `part`.

    A position is round(y (n - 1)) n + round(x (n - 1)) with n = int(sqrt(vocab_size)); the padding
    is vocab_size - 1. `part` is left, top, right and bottom of the part of the picture that is
    shown, omitted where max_length is a multiple of 3. ValueError for more boxes than fit, or a
    class that is no token.
    """
    room, padding = max_objects(max_length), vocab_size - 1
    if len(boxes) > room:
        raise ValueError(f"{len(boxes)} objects, but the model takes at most {room}")
    tokens = []
    for box in boxes:
        if not 0 <= box.label < padding:
            raise ValueError(f"class {box.label} is not in 0..{padding - 1}, the model's tokens")
        tokens += [box.label, *_corners(box[1:], vocab_size)]
    tokens += [padding] * (3 * room - len(tokens))
    if max_length % 3:
        tokens += _corners(part, vocab_size)
    return np.asarray(tokens, np.int32)


def read_names(path: epath.PathLike) -> dict[str, int]:
    """{class name in lower case: id} from a file, or of "coco".

    JSON: a list of names, numbered from 0, or an object of name and id. CSV: rows of id and name as
    OpenImages' class-descriptions-boxable.csv, numbered in the order of their ids with Suitcase
    last, as the reference does. ValueError names the file and its fault.
    """
    if str(path) == "coco":
        return {name: i for i, name in enumerate(COCO)}
    path = epath.Path(path)
    if path.suffix == ".csv":
        rows = [row for row in csv.reader(io.StringIO(reading.read_text(path))) if len(row) == 2]
        rows.sort(key=lambda row: (row[0] == SUITCASE, row[0]))
        labels = [(name, i) for i, (_, name) in enumerate(rows)]
    else:
        data = reading.read_json(path)
        if not isinstance(data, list | dict):
            raise ValueError(f"{path}: give a list of class names, or an object of name and id")
        labels = (
            list(data.items()) if isinstance(data, dict) else [(n, i) for i, n in enumerate(data)]
        )
    if not labels:
        raise ValueError(f"{path}: holds no class names")
    names = {}
    for name, label in labels:
        if not isinstance(name, str) or not _whole(label) or label < 0:
            raise ValueError(f"{path}: {name!r}: {label!r} is not a name and an id from 0 on")
        if names.setdefault(name.lower(), label) != label:
            raise ValueError(f"{path}: the class {name!r} stands there twice")
    return names


def read_layout(path: epath.PathLike, names: dict[str, int] | None = None) -> list[Box]:
    """The boxes in a JSON file.

    It holds {"objects": [{"class": NAME or ID, "box": [left, top, right, bottom]}, ...]}, in
    fractions of the picture or, with "size": [width, height], in pixels. An object may also say
    `true` for "group", "occluded", "depiction" or "inside", as OpenImages does.
    `names` are those of `read_names`; without them only ids are known.
    ValueError names the file, the number of the object (from 1) and its fault.
    """
    path = epath.Path(path)
    data = reading.read_json(path)
    objects = data.get("objects") if isinstance(data, dict) else None
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise ValueError(
            f'{path}: is not {{"objects": [{{"class": NAME or ID, "box": [left, top, right,'
            " bottom]}, ...]}"
        )
    size = data.get("size", [1, 1])
    if not _numbers(size, 2) or min(size) <= 0:
        raise ValueError(f"{path}: size {size!r} is not [width, height] in pixels")
    boxes = []
    for i, one in enumerate(objects, 1):
        try:
            boxes.append(Box(_label(one, names), *_sides(one.get("box"), size)))
        except ValueError as error:
            raise ValueError(f"{path}: object {i}: {error}") from error
    return boxes


def _corners(sides: Sequence[float], vocab_size: int) -> list[int]:
    side = math.isqrt(vocab_size)
    left, top, right, bottom = (round(x * (side - 1)) for x in sides)
    return [top * side + left, bottom * side + right]


def _sides(box: object, size: Sequence[float]) -> tuple[float, ...]:
    if not _numbers(box, 4):
        raise ValueError(f"box {box!r} is not [left, top, right, bottom]")
    width, height = size
    sides = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    unit = "in fractions: 0..1" if list(size) == [1, 1] else f"{width} x {height} pixels"
    if min(sides) < 0 or max(sides) > 1:
        hint = '; boxes in pixels need "size": [width, height]' if max(sides) > 2 else ""
        raise ValueError(f"box {box} lies outside the picture ({unit}){hint}")
    if sides[0] >= sides[2] or sides[1] >= sides[3]:
        raise ValueError(f"box {box} is empty: give [left, top, right, bottom]")
    return sides


def _label(one: dict, names: dict[str, int] | None) -> int:
    given = one.get("class")
    if isinstance(given, str):
        label = _named_label(given, names)
    elif _whole(given):
        label = given
        if names is not None and label not in names.values():
            raise ValueError(f"class {label} is none of the {len(names)} known ids")
    else:
        raise ValueError(f"class {given!r} is neither a name nor an id")
    modifier = sum(2**bit for bit, word in enumerate(MODIFIERS) if one.get(word) is True)
    if modifier and names is None:
        said = next(word for word in MODIFIERS if one.get(word) is True)
        raise ValueError(f'"{said}" needs the class names: its token depends on how many there are')
    return label + modifier * len(names or ())


def _named_label(name: str, names: dict[str, int] | None) -> int:
    if names is None:
        raise ValueError(f"class {name!r}: without class names give the id")
    if name.lower() not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3)
        hint = f"; near are {', '.join(map(repr, near))}" if near else ""
        raise ValueError(f"unknown class {name!r}, none of the {len(names)} names{hint}")
    return names[name.lower()]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(value: object, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(x, int | float) and math.isfinite(x) for x in value)
    )
