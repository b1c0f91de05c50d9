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
NUMBER = r"[+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})"  # bounded: the time stays linear
BLANKS = r"\s{0,20}"
TOKEN = re.compile(
    rf"\\[()\[\]\\]|\(|\[|:{BLANKS}({NUMBER}){BLANKS}\)|\)|\]|[^\\()\[\]:]+|.", re.DOTALL
)
BREAKS = re.compile(r"\bBREAK\b")


def parse(text: str) -> list[Piece]:
    """Pieces of a prompt, in order: neighbours differ in weight; `BREAK` stands between texts."""
    pieces: list[list] = []  # [texts, weight]
    opened: dict[str, list[int]] = {"(": [], "[": []}  # pieces before each open bracket
    largest = 0.0
    fresh = False  # the last piece goes on: no bracket since

    def add(part: str) -> None:
        nonlocal fresh
        if fresh:
            pieces[-1][0].append(part)
        else:
            pieces.append([[part], 1.0])
        fresh = True

    def close(bracket: str, weight: float) -> None:
        nonlocal largest, fresh
        fresh = False
        for piece in pieces[opened[bracket].pop() :]:
            product = piece[1] * clamped(weight)
            largest = max(largest, abs(product), abs(weight))
            piece[1] = clamped(product)

    for match in TOKEN.finditer(text):
        token, weight = match.group(), match.group(1)
        if token in opened and len(opened["("]) + len(opened["["]) < DEEPEST:
            opened[token].append(len(pieces))
            fresh = False
        elif weight is not None and opened["("]:
            close("(", float(weight))
        elif token == ")" and opened["("]:
            close("(", ROUND)
        elif token == "]" and opened["["]:
            close("[", SQUARE)
        elif token[0] == "\\" and len(token) == 2:
            add(token[1])
        else:
            first, *rest = BREAKS.split(token)
            add(first.rstrip() if rest else first)
            for i, part in enumerate(rest, 1):
                pieces.append([[BREAK[0]], BREAK[1]])
                fresh = False
                add(part.lstrip() if i == len(rest) else part.strip())
    for bracket, weight in (("(", ROUND), ("[", SQUARE)):  # those that nothing closes
        while opened[bracket]:
            close(bracket, weight)
    if largest > LARGEST:
        LOG.warning("prompt %r: a weight of %g becomes %g", text[:40], largest, LARGEST)
    return [("".join(texts), weight) for texts, weight in _merged(pieces)] or [("", 1.0)]


def _merged(pieces: list[list]) -> list[list]:
    """Neighbours of one weight as one piece."""
    merged: list[list] = []
    for texts, weight in pieces:
        alone = BREAK[0] in (texts[0], merged[-1][0][0] if merged else "")
        if merged and merged[-1][1] == weight and not alone:
            merged[-1][0].extend(texts)
        else:
            merged.append([texts, weight])
    return merged


def clamped(weight: float) -> float:
    """A weight, or the largest one of its sign."""
    return min(max(weight, -LARGEST), LARGEST)
