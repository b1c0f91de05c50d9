"""Prompts of any length, as stable-diffusion-webui cuts them: chunks of 75 tokens for CLIP.

Each chunk is encoded alone, between a start and an end token, and what the text encoder makes of
the chunks is joined. A chunk that is full inside of a phrase ends at a comma not far before.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ldm_jax.prompting.emphasis import BREAK, Piece

BACKTRACK = 20
"""A full chunk ends at its last comma if that is at most so many tokens back."""


class Chunk(NamedTuple):
    """Ids of a chunk, without start and end, and the weight of each."""

    ids: list[int]
    weights: list[float]


class Ids(NamedTuple):
    """Facts of a tokenizer that chunks need."""

    of: Callable[[str], list[int]]
    """Ids of a text alone."""
    comma: int
    vocab_size: int
    """Ids from it on are learned words, whose vectors stay together."""


def split(pieces: Sequence[Piece], ids: Ids, size: int) -> list[Chunk]:
    """The chunks, of at most `size` ids, of a prompt: at least one."""
    chunks, comma = [Chunk([], [])], -1
    ended = False  # a chunk that BREAK has ended: another begins with the next id

    def begin(moved: Chunk) -> None:
        nonlocal comma
        chunks.append(moved)
        comma = -1

    for text, weight in pieces:
        if (text, weight) == BREAK:
            if ended:
                begin(Chunk([], []))
            ended = True
            continue
        for word in _words(ids.of(text), ids.vocab_size):
            if ended:
                begin(Chunk([], []))
                ended = False
            now = chunks[-1]
            if word == [ids.comma]:
                comma = len(now.ids)
            elif len(now.ids) == size and comma >= 0 and size - comma <= BACKTRACK:
                moved = Chunk(now.ids[comma + 1 :], now.weights[comma + 1 :])
                del now.ids[comma + 1 :], now.weights[comma + 1 :]
                begin(moved)
            if len(chunks[-1].ids) + len(word) > size:
                begin(Chunk([], []))
            chunks[-1].ids.extend(word[:size])  # a learned word longer than a chunk is cut
            chunks[-1].weights.extend([weight] * min(size, len(word)))
    return chunks


def _words(ids: Sequence[int], vocab_size: int) -> Iterator[list[int]]:
    """Ids one by one, but those of a learned word, which follow each other, together."""
    word: list[int] = []
    for i in ids:
        if word and (i < vocab_size or i != word[-1] + 1):
            yield word
            word = []
        word.append(i)
        if i < vocab_size:
            yield word
            word = []
    if word:
        yield word
