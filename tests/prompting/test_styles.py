"""Styles of stable-diffusion-webui."""

import pytest

from ldm_jax.prompting import styles
from ldm_jax.sample import img2img, styling, text2img

TABLE = (
    "\ufeffname,prompt,negative_prompt\r\n"
    'photo,"a photo of {prompt}, 35mm","blurry\nsoft"\r\n'
    "oil,in oil,\r\n"
    ",nameless,\r\n"
    "twice,{prompt} and {prompt},no {prompt}\r\n"
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "styles.csv"
    path.write_text(TABLE, newline="")
    return str(path)


def test_a_style_goes_around_a_prompt_or_behind_it(table):
    known = styles.read(table)
    assert [*known] == ["photo", "oil", "twice"]
    assert known["photo"].around("cat", "") == ("a photo of cat, 35mm", "blurry\nsoft")
    assert known["oil"].around("cat ", "dog") == ("cat, in oil", "dog")
    assert known["oil"].around("", "") == ("in oil", "")
    assert known["twice"].around("cat", "dog") == ("cat and cat", "no dog")


def test_options_in_several_styles(table):
    given = {"styles": table, "style": ("oil", "photo"), "negative_prompt": "dog"}
    asked = styling.styled(text2img.Options("", "", prompt=("cat", "fox"), **given))
    assert asked.prompt == ("a photo of cat, in oil, 35mm", "a photo of fox, in oil, 35mm")
    assert (asked.negative_prompt, asked.style, asked.styles) == ("dog, blurry\nsoft", (), None)
    alone = styling.styled(img2img.Options("", "", styles=table, style=("oil",)))
    assert alone.prompt == ("in oil",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"style": ("ink",)}, "--style 'ink': there is no such style, but photo, oil, twice"),
        ({"styles": None}, "--style oil: give --styles, the file that it is in"),
        ({"prompt_file": "a.txt"}, "--style is for --prompt: write it into the lines"),
    ],
)
def test_a_style_that_cannot_be_is_refused(table, given, message):
    options = text2img.Options("", "", **{"styles": table, "style": ("oil",), **given})
    with pytest.raises(ValueError, match=message):
        text2img.request(options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a,b\n1,2\n", r"has the columns \['a', 'b'\], and not name"),
        (b'name,prompt\na,"b" c\n', "is not CSV"),
        (b"name,prompt\n\xff,b\n", "styles.csv"),
        (b"", r"has the columns \[\]"),
    ],
)
def test_a_file_without_styles_is_refused(table, text, message):
    with open(table, "wb") as file:
        file.write(text)
    with pytest.raises(ValueError, match=message):
        styles.read(table)
