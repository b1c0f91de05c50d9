"""Prompts that change: the values recorded from stable-diffusion-webui 1.10.1 at 20 steps."""

import pytest

from ldm_jax.prompting import schedules

TURNS = [(step, "ba"[step % 2]) for step in range(1, 21)]


@pytest.mark.parametrize(
    ("prompt", "entries"),
    [
        ("[a:b:0.5]", [(10, "a"), (20, "b")]),
        ("[a:b:5]", [(5, "a"), (20, "b")]),
        ("[a:0.5]", [(10, ""), (20, "a")]),
        ("[a::0.5]", [(10, "a"), (20, "")]),
        ("[a:b:1]", [(1, "a"), (20, "b")]),
        ("[a:b:1.0]", [(20, "a")]),
        ("[a:b:0]", [(20, "b")]),
        ("[a:b:0.01]", [(20, "b")]),
        ("[a:b:25]", [(20, "a")]),
        ("[[a:b:0.2]:c:0.6]", [(4, "a"), (12, "b"), (20, "c")]),
        ("[a|b]", TURNS),
        ("x [a:b:.25], (y:1.2)", [(5, "x a, (y:1.2)"), (20, "x b, (y:1.2)")]),
        ("[a (x:1.2):b:0.5]", [(10, "a (x:1.2)"), (20, "b")]),
        ("[a:b]", [(20, "[a:b]")]),
        ("[a:b:c:0.5]", [(20, "[a:b:c:0.5]")]),
        ("[a:b:nan]", [(20, "[a:b:nan]")]),
        (r"\[a:b:0.5\]", [(20, r"\[a:b:0.5\]")]),
        ("[a : b : 0.5 ]", [(10, "a "), (20, " b ")]),
        ("[[[ a", [(20, "[[[ a")]),
    ],
)
def test_texts_and_their_last_steps(prompt, entries):
    assert schedules.schedule(prompt, 20) == entries


@pytest.mark.parametrize(
    ("prompt", "entries"),
    [
        ("[a:b:0.5]", [(10, "b")]),
        ("[a:b:1.5]", [(5, "a"), (10, "b")]),
        ("[a:b:25]", [(5, "a"), (10, "b")]),
    ],
)
def test_a_pass_of_ten_steps_after_one_of_twenty(prompt, entries):
    assert schedules.schedule(prompt, 10, before=20) == entries


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a :1.2 AND b:0.5", [("a ", 1.2), (" b", 0.5)]),
        ("SANDAL AND b: -0.5", [("SANDAL ", 1.0), (" b", -0.5)]),
        ("a (x:1.2)", [("a (x:1.2)", 1.0)]),
    ],
)
def test_prompts_that_and_joins(prompt, parts):
    assert schedules.parts(prompt) == parts


def test_brackets_beyond_the_deepest_are_text():
    prompt = "[" * 50_000 + "a"
    assert schedules.schedule(prompt, 20) == [(20, prompt)]
    (_, (last, text)) = schedules.schedule(prompt + ":0.5]", 20)
    assert (last, text) == (20, prompt.replace("[", "", 1))


def test_what_would_be_too_much_work_is_refused():
    with pytest.raises(ValueError, match="joins 17 by AND, 16 at most"):
        schedules.parts(" AND ".join("a" * 17))
    turns = "".join(f"[{'|'.join(map(str, range(n)))}]" for n in (2, 3, 5, 7))
    with pytest.raises(ValueError, match="is more than 128 different texts in turn"):
        schedules.schedule(turns, 1000)


@pytest.mark.parametrize("number", ["9" * 40, "." * 9, "1" * 21])
def test_what_is_no_number_is_text(number):
    prompt = f"[a:b:{number}]"
    assert schedules.schedule(prompt, 20) == [(20, prompt)]
    assert schedules.parts(f"a:{number}") == [(f"a:{number}", 1.0)]
