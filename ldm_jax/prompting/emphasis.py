r"""Weights in prompts, as stable-diffusion-webui reads them.

    (x)      weight 1.1             [x]      weight 1 / 1.1
    (x:1.5)  weight 1.5             \( \[    the brackets themselves
    BREAK    the text before it fills its chunk of tokens

Brackets nest, and their weights multiply.
"""

import re

from ldm_jax.runtime.log import LOG

Piece = tuple[str, float]
"""A text and its weight."""

ROUND, SQUARE = 1.1, 1 / 1.1
BREAK: Piece = ("BREAK", -1.0)
"""The piece that ends a chunk. Inside of weighted brackets the word has another weight, and is read
as a word, as there."""
LARGEST = 100.0  # weights beyond it, of either sign, are brought back to it
DEEPEST = 256  # brackets open at once; those beyond are text, so that the time stays linear
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
TOKEN = re.compile(rf"\\[()\[\]\\]|\(|\[|:\s*({NUMBER})\s*\)|\)|\]|[^\\()\[\]:]+|.", re.DOTALL)
BREAKS = re.compile(r"\s*\bBREAK\b\s*")


def parse(text: str) -> list[Piece]:
    """Pieces of a prompt, in order: neighbours differ in weight; `BREAK` stands between texts."""
    pieces: list[list] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # pieces before each open bracket

    def close(bracket: str, weight: float) -> None:
        for piece in pieces[opened[bracket].pop() :]:
            piece[1] *= weight

    for match in TOKEN.finditer(text):
        token, weight = match.group(), match.group(1)
        if token in opened and len(opened["("]) + len(opened["["]) < DEEPEST:
            opened[token].append(len(pieces))
        elif weight is not None and opened["("]:
            close("(", float(weight))
        elif token == ")" and opened["("]:
            close("(", ROUND)
        elif token == "]" and opened["["]:
            close("[", SQUARE)
        elif token[0] == "\\" and len(token) == 2:
            pieces.append([token[1], 1.0])
        else:
            for i, part in enumerate(BREAKS.split(token)):
                pieces += [[*BREAK], [part, 1.0]] if i else [[part, 1.0]]
    for bracket, weight in (("(", ROUND), ("[", SQUARE)):  # those that nothing closes
        while opened[bracket]:
            close(bracket, weight)
    return [(text, _bounded(text, weight)) for text, weight in _merged(pieces)] or [("", 1.0)]


def _merged(pieces: list[list]) -> list[list]:
    """Neighbours of one weight as one piece."""
    merged: list[list] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight and BREAK[0] not in (text, merged[-1][0]):
            merged[-1][0].append(text)
        else:
            merged.append([[text], weight])
    return [["".join(texts), weight] for texts, weight in merged]


def _bounded(text: str, weight: float) -> float:
    bounded = min(max(weight, -LARGEST), LARGEST)
    if bounded != weight:
        LOG.warning("prompt: the weight of %r is %g, and becomes %g", text[:40], weight, bounded)
    return bounded
