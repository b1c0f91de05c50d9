"""Tokenizers give the ids of transformers, name what they cut off, and outlive their folder."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import transformers

from ldm_jax.data import tokens

TEXTS = ["a cat, and a DOG!", "", "don't  stop the café dog 😀, cat and more and more"]


def byte_symbols():
    """The characters that byte-level BPE writes for the 256 bytes, printable ones first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small vocabulary of CLIP's form and one of BERT's."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name in ("clip", "bert"):
        (root / name).mkdir()
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "a n", "an d</w>"]
    symbols = byte_symbols()
    vocab = symbols + [f"{s}</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocab)}
    (root / "clip" / "vocab.json").write_text(json.dumps(ids))
    (root / "clip" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "and", ",", "!", "'"]
    vocab += [*letters, *(f"##{letter}" for letter in letters)]
    (root / "bert" / "vocab.txt").write_text("\n".join([*vocab, ""]))
    return root


KINDS = {"clip": (transformers.CLIPTokenizer, 12), "bert": (transformers.BertTokenizer, 9)}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("saved", [False, True])
def test_ids_are_those_of_transformers(name, saved, folders, tmp_path):
    kind, length = KINDS[name]
    theirs = kind.from_pretrained(folders / name)
    folder = folders / name
    if saved:  # as one tokenizer.json
        folder = tmp_path
        theirs.save_pretrained(folder)
    ours = tokens.load_tokenizer(folder, length)
    got = ours.encode(TEXTS)
    assert got.dtype == np.int32
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=length)
    np.testing.assert_array_equal(got, expected["input_ids"])
    assert ours.vocab_size == len(theirs)
    assert ours.encode([]).shape == (0, length)


@pytest.mark.parametrize("name", KINDS)
def test_lost_words(name, folders):
    length = KINDS[name][1]
    ours = tokens.load_tokenizer(folders / name, length)
    assert ours.lost(TEXTS[0]) == ours.lost("") == ""
    assert (
        ours.lost(TEXTS[2])
        == {
            "clip": "the café dog 😀, cat and more and more",  # "th" fits
            "bert": "stop the café dog 😀, cat and more and more",
        }[name]
    )
    fits = " ".join(["cat"] * (length - 2))  # beside the two special tokens
    assert ours.lost(fits) == ""
    assert ours.lost(f"{fits} dog  and cat") == "dog  and cat"


@pytest.mark.parametrize("name", KINDS)
def test_pickled_and_saved_without_the_folder(name, folders, tmp_path):
    kind, length = KINDS[name]
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (folders / name).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    ours = tokens.load_tokenizer(copy, length)
    for file in copy.iterdir():
        file.unlink()
    expected = ours.encode(TEXTS)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ours)).encode(TEXTS), expected)
    ours.save(tmp_path / "saved")
    again = tokens.load_tokenizer(tmp_path / "saved", length)
    np.testing.assert_array_equal(again.encode(TEXTS), expected)
    theirs = kind.from_pretrained(tmp_path / "saved")
    ids = theirs(TEXTS, padding="max_length", truncation=True, max_length=length)["input_ids"]
    np.testing.assert_array_equal(ids, expected)


def test_threads_share_one(folders):
    ours = tokens.load_tokenizer(folders / "clip", 12)
    expected = ours.encode(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: (ours.lost(TEXTS[2]), ours.encode(TEXTS))[1], range(200)):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("saved", [False, True])
def test_another_id_pads_and_is_saved(saved, folders, tmp_path):
    folder = folders / "clip"
    if saved:
        folder = tmp_path / "theirs"
        transformers.CLIPTokenizer.from_pretrained(folders / "clip").save_pretrained(folder)
    start, end = 518, 519
    assert tokens.load_tokenizer(folder, 5).encode(["cat"]).tolist() == [[start, 513, *[end] * 3]]
    ours = tokens.load_tokenizer(folder, 5, pad_id=0)
    assert ours.encode(["cat"]).tolist() == [[start, 513, end, 0, 0]]
    ours.save(tmp_path / "ours")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    ids = theirs(["cat"], padding="max_length", max_length=5)["input_ids"]
    assert ids == [[start, 513, end, 0, 0]]
    with pytest.raises(ValueError, match="no token with id 1000"):
        tokens.load_tokenizer(folder, 5, pad_id=1000)


def test_bytes(tmp_path):
    ours = tokens.load_tokenizer("bytes", 6)
    ids = ours.encode(["aé", "", "abcdefgh"])
    assert ids.dtype == np.int32
    assert ids.tolist() == [[98, 196, 170, 0, 0, 0], [0] * 6, [98, 99, 100, 101, 102, 103]]
    assert [ours.lost(text) for text in ("", "abcdef", "abcdefgh", "abcdeé")] == ["", "", "gh", "é"]
    ours.save(tmp_path)
    again = pickle.loads(pickle.dumps(tokens.load_tokenizer(tmp_path, 6)))
    assert isinstance(again, tokens.ByteTokenizer)
    assert again.max_length == 6
    assert ids.max() < again.vocab_size


def test_a_missing_or_wrong_folder_is_a_clear_error(folders, tmp_path):
    def refuse(kind, match, **files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / name.replace("_json", ".json").replace("_txt", ".txt")).write_text(text)
        with pytest.raises(kind, match=f"{folder}.*{match}"):
            tokens.load_tokenizer(folder, 12)

    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*nowhere.*vocab.txt"):
        tokens.load_tokenizer(tmp_path / "nowhere", 12)
    vocab = (folders / "clip" / "vocab.json").read_text()
    refuse(FileNotFoundError, "vocab.json and merges.txt", vocab_json=vocab)
    refuse(ValueError, "", vocab_json=vocab[:100], merges_txt="a b")
    other = json.dumps({"tokenizer_class": "T5TokenizerFast"})
    refuse(ValueError, "T5Tokenizer is not supported", tokenizer_config_json=other, vocab_txt="a")
    unigram = json.dumps({"model": {"type": "Unigram"}})
    refuse(ValueError, "Unigram model is not supported", tokenizer_json=unigram)
    with pytest.raises(ValueError, match="max_length 2 "):
        tokens.load_tokenizer("bytes", 2)
