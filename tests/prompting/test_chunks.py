"""Chunks of 75 tokens: the numbers recorded from stable-diffusion-webui 1.10.1."""

import pytest

from ldm_jax.prompting import chunks, emphasis

WORD, COMMA, LEARNED = 1, 2, 100  # ids; learned words from 100 on


def ids_of(text):
    """w is a word, `,` the comma, and e a learned word of eight vectors."""
    return [i for c in text for i in {"w": [WORD], ",": [COMMA], "e": range(100, 108)}.get(c, [])]


IDS = chunks.Ids(ids_of, COMMA, LEARNED)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("w" * 75, [75]),
        ("w" * 76, [75, 1]),
        ("w" * 60 + "," + "w" * 20, [61, 20]),
        ("w" * 50 + "," + "w" * 29, [75, 5]),
        ("w" * 75 + ",ww", [75, 3]),
        ("BREAK w", [0, 1]),
        ("w BREAK", [1]),
        ("w BREAK BREAK w", [1, 0, 1]),
        ("", [0]),
        ("w" * 70 + "ew", [70, 9]),
        ("wew", [10]),
    ],
)
def test_tokens_of_each_chunk(text, sizes):
    made = chunks.split(emphasis.parse(text), IDS, 75)
    assert [len(chunk.ids) for chunk in made] == sizes


def test_each_vector_of_a_learned_word_has_its_weight():
    (chunk,) = chunks.split(emphasis.parse("w(e:1.5)w"), IDS, 75)
    assert chunk.weights == [1, *[1.5] * 8, 1]
    assert chunk.ids == [1, *range(100, 108), 1]
