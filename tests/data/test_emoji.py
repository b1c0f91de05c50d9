"""Emoji scenes: captions tell what is drawn, and held-out pairs and icons never train."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from ldm_jax import configs, data, schema
from ldm_jax.configs import emoji as config
from ldm_jax.data import emoji, tokens

needs_font = pytest.mark.skipif(
    not os.path.isfile(schema.EmojiConfig.font), reason=f"needs Debian's {emoji.PACKAGE}"
)


def source(split="train", **fields):
    return emoji.EmojiSource(schema.EmojiConfig(**fields), split)


def test_pairs_held_out_are_an_eighth_in_both_orders():
    pairs = emoji.held_out_pairs()
    assert len(pairs) == len(set(pairs)) == 64 * 64 // 8
    assert {(b, a) for a, b in pairs} == set(pairs)
    for side in zip(*pairs):
        assert {side.count(name) for name in emoji.NAMED} == {8}
    assert not any(a == b for a, b in pairs)
    assert not emoji.is_held_out("cow", "tiger")
    assert not emoji.is_held_out("robot", "bear")


@needs_font
def test_training_never_shows_what_is_held_out():
    captions = [source()[i]["caption"] for i in range(2000)]
    words = {word for caption in captions for word in re.findall(r"\w+", caption)}
    assert words == {"a", "an", "left", "of", "thing", *emoji.NAMED}
    held_out = {emoji.caption(*pair) for pair in emoji.held_out_pairs()}
    assert held_out.isdisjoint(captions)
    single = np.mean([" left of " not in caption for caption in captions])
    things = np.mean(
        [caption.count("thing") / (1 + caption.count("left of")) for caption in captions]
    )
    np.testing.assert_allclose([single, things], [emoji.SINGLE, 16 / 80], atol=0.03)
    evaluated = source("eval")
    assert {evaluated[i]["caption"] for i in range(len(evaluated))} == held_out


@needs_font
def test_a_scene_follows_from_split_and_index():
    one, other = source(num_images=50), pickle.loads(pickle.dumps(source()))
    assert len(pickle.dumps(other)) < 10**5  # no pixels
    assert (len(one), one.describe(3)) == (50, "emoji train scene 3")
    np.testing.assert_array_equal(one[7]["image"], other[7]["image"])
    pictures = np.stack([other[i]["image"] for i in range(200)])
    assert (pictures.shape[1:], pictures.dtype) == ((32, 32, 3), np.uint8)
    assert len(np.unique(pictures.reshape(200, -1), axis=0)) == 200
    assert pictures[:, 0, 0].min() >= 200  # the ground is pale


@needs_font
@pytest.mark.parametrize("size", [16, 32, 64])
def test_icons_lie_side_by_side_or_in_the_middle(size):
    rng = np.random.default_rng(0)
    for names in (("pig", "car"), ("heart",)):
        image = emoji.scene(names, rng, size=size).astype(int)
        drawn = np.abs(image - image[0, 0]).max(axis=-1) > 8
        columns = np.flatnonzero(drawn.any(axis=0))
        assert columns[0] < size / 2 < columns[-1]
        assert (columns[0] > size / 8) == (len(names) == 1)
        assert (np.ptp(columns) < size * 0.55) == (len(names) == 1)


def test_captions():
    assert emoji.caption("pig") == "a pig"
    assert emoji.caption("owl", "tiger") == "an owl left of a thing"
    assert emoji.caption("tiger", "robot") == "a thing left of a robot"


def test_every_name_is_one_token():
    tokenizer = tokens.load_tokenizer(config.WORDS, 12)
    assert tokenizer.vocab_size == config.VOCABULARY
    unknown = tokenizer.encode(["@"])[0, 1]
    for name in (*emoji.NAMES, "thing", "sks"):
        ids = tokenizer.encode([f"an {name} left of a {name}"])[0]
        assert (np.count_nonzero(ids), unknown in ids) == (8, False), name
    assert unknown not in tokenizer.encode(["wombat"])  # spelt
    assert Path(configs.__file__).parent in config.WORDS.parents


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"none\.ttf: .*\(apt install fonts-noto-color-emoji"
    ):
        source(font=str(tmp_path / "none.ttf"))
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(ValueError, match=r"text\.ttf: is no font with bitmaps of 109 pixels"):
        source(font=str(tmp_path / "text.ttf"))
    for fields in ({"size": 15}, {"size": 33}, {"num_images": 0}):
        with pytest.raises(
            ValueError, match=rf"{next(iter(fields))} {next(iter(fields.values()))}"
        ):
            source(**fields)
    # a font of letters draws nothing in colour
    monkeypatch.setattr(emoji, "_opened", lambda _: ImageFont.load_default(10))
    monkeypatch.setattr(emoji.ImageDraw.ImageDraw, "text", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"letters\.ttf: does not draw PIG FACE"):
        emoji.cells("letters.ttf", 16)


@needs_font
def test_examples_of_a_stream():
    stream = data.stream(config.DATA, batch_size=4, seed=0, split="train")
    assert stream[0]["image"].shape == (32, 32, 3)
