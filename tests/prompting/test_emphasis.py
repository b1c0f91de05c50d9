"""Weights of prompts: the values recorded from stable-diffusion-webui 1.10.1."""

import pytest

from ldm_jax.prompting import emphasis


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a (b:1.5) c", [("a ", 1), ("b", 1.5), (" c", 1)]),
        ("((a))", [("a", 1.2100000000000002)]),
        ("[a]", [("a", 0.9090909090909091)]),
        (r"a (b) [c] \(d\)", [("a ", 1), ("b", 1.1), (" ", 1), ("c", 1 / 1.1), (" (d)", 1)]),
        ("(a:1.2", [("a:1.2", 1.1)]),
        ("(a (b:1.5)):2", [("a ", 1.1), ("b", 1.5 * 1.1), (":2", 1)]),
        ("(a (b:1.5):2)", [("a ", 2), ("b", 3)]),
        ("((a:1.2) b)", [("a", 1.2 * 1.1), (" b", 1.1)]),
        ("(a:1,2)", [("a:1,2", 1.1)]),
        ("[a:1.5]", [("a:1.5", 1 / 1.1)]),
        ("(a:-1)", [("a", -1)]),
        ("(:1.5)", [("", 1)]),
        ("", [("", 1)]),
        ("a BREAK b", [("a", 1), ("BREAK", -1), ("b", 1)]),
        ("(a BREAK b:1.3)", [("a", 1.3), ("BREAK", -1.3), ("b", 1.3)]),
        (" a  BREAK  (b:1.1) ", [(" a", 1), ("BREAK", -1), ("", 1), ("b", 1.1), (" ", 1)]),
        ("(a:1e9)", [("a:1e9", 1.1)]),
        ("a)b]", [("a)b]", 1)]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
    ],
)
def test_pieces_and_weights(text, pieces):
    assert emphasis.parse(text) == pieces


def test_a_huge_weight_is_bounded_aloud(caplog):
    assert emphasis.parse("(a:999999)") == [("a", emphasis.LARGEST)]
    assert "prompt '(a:999999)': a weight of 999999 becomes 100" in caplog.text
    assert emphasis.parse("((a:0):99999999999999999999)") == [("a", 0)]


def test_brackets_beyond_the_deepest_are_text():
    depth = emphasis.DEEPEST
    (piece,) = emphasis.parse("(" * 100_000 + "a")
    assert piece == ("(" * (100_000 - depth) + "a", emphasis.LARGEST)


@pytest.mark.parametrize(("first", "more"), [("", " "), ("(:", " "), ("(:", "1"), ("", ": ")])
def test_the_time_is_linear(first, more):
    """A quadratic reader would need an hour."""
    text = first + more * 10**5
    ((found, _),) = emphasis.parse(text)
    assert found == text.lstrip("(")
