"""Captions of a folder's images from metadata.jsonl, and file names that look the same.

    {"file_name": "a/cat.png", "text": "a cat"}
    {"file_name": "a/dog.png", "text": ["a dog", "a brown dog"]}

`file_name` is relative to the table's folder. An image may have several captions, in a list or on
several lines; each example of it draws one.
"""

import os
import posixpath
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from ldm_jax.runtime import reading
from ldm_jax.runtime.log import LOG

TABLE = "metadata.jsonl"
Caption = str | list[str]
SHOWN = 5  # names in a message


class Names:
    """Names of files, looked up as written or else in their normal form NFC.

    macOS stores `é` as two characters (NFD) where others write one (NFC).
    """

    def __init__(self, names: Iterable[str]):
        self._names = set(names)
        plain = (name for name in self._names if not name.isascii())
        self._looks = {_look(name): name for name in plain}

    def find(self, name: str) -> str | None:
        """The stored name, or None."""
        return name if name in self._names else self._looks.get(_look(name))


def _look(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def captions(root: str, images: Sequence[str], files: Iterable[str]) -> list[Caption]:
    """The caption of each image, a list for several; `images` and `files` are relative to `root`.

    ValueError and FileNotFoundError name the table and line, or the images without a line.
    """
    tables = sorted(f for f in files if posixpath.basename(f) == TABLE)
    if not tables:
        raise FileNotFoundError(f"no {TABLE} in {root}: add one, or set captions to none")
    texts: dict[str, list[str]] = {}
    for table in tables:
        path = os.path.join(root, table)
        for number, line in enumerate(reading.lines(reading.read_text(path)), 1):
            if line.strip():
                name, new = _entry(line, f"{path}:{number}")
                name = posixpath.normpath(posixpath.join(posixpath.dirname(table), name))
                known = texts.setdefault(name, [])
                known += [text for text in new if text not in known]
    names = Names(texts)
    keys = [names.find(image) for image in images]
    missing = [image for image, name in zip(images, keys) if name is None]
    if missing:
        raise ValueError(
            f"{os.path.join(root, missing[0])} is in no {TABLE}: add a line for it"
            f" ({len(missing)} of {len(images)} images have none{listed(missing)})"
        )
    several = sum(len(texts[name]) > 1 for name in keys if name is not None)
    if several:
        LOG.info(
            f"{root}: {several} of {len(images)} images have several captions; every example draws"
            " one of them"
        )
    return [_one(texts[name]) for name in keys if name is not None]


def listed(names: Sequence[str]) -> str:
    """`: a, b, ...` from the first few of several names; "" for a single one."""
    if len(names) < 2:
        return ""
    return f": {', '.join(names[:SHOWN])}" + (", ..." if len(names) > SHOWN else "")


def _one(texts: list[str]) -> Caption:
    return texts[0] if len(texts) == 1 else texts


def _entry(line: str, where: str) -> tuple[str, list[str]]:
    """(file name, captions) of a line."""
    try:
        entry: Any = reading.parse_json(line, where)
        name, text = entry["file_name"], entry["text"]
        texts = text if isinstance(text, list) else [text]
        if not isinstance(name, str) or not texts or not all(isinstance(x, str) for x in texts):
            raise TypeError(f"file_name is {name!r:.80}, text is {text!r:.80}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: each line is an object with file_name and text, or a list of texts"
            f" ({error!r:.300})"
        ) from error
    return name, texts
