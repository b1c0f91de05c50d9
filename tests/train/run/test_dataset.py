"""data.json: a run on classes goes on with its own classes only, and says what has changed."""

import json
import logging
import types

import pytest
from PIL import Image

from ldm_jax import data, schema
from ldm_jax.runtime import rundir
from ldm_jax.train.run import dataset


def streams(classes, train=8, held_out=2):
    """(stream, held_out) of data with these names."""
    source = types.SimpleNamespace(classes=classes)
    return tuple(types.SimpleNamespace(source=source, num_records=n) for n in (train, held_out))


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="ldm_jax")


def begun(run, classes):
    dataset.keep(run, dataset.check(run, *streams(classes), labels=True), resumed=False)
    return run


def test_names_and_records_are_kept_and_shown(tmp_path, caplog):
    begun(tmp_path, ("cat", "größer"))
    assert json.loads((tmp_path / "data.json").read_text()) == {
        "format": 1, "classes": ["cat", "größer"], "records": {"train": 8, "eval": 2},
    }  # fmt: skip
    assert caplog.messages == ["classes: 0 cat, 1 größer"]
    many = dataset.table(tuple(map(str, range(23))))
    assert many.endswith("19 19 and 3 more, in data.json")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (("ant", "cat", "dog"), "added 'ant'; id 0 was 'cat' and would be 'ant'"),
        (("cat",), "missing 'dog'"),
        (("cat", "cow"), "added 'cow'; missing 'dog'; id 1 was 'dog' and would be 'cow'"),
        (("dog", "cat"), "id 0 was 'cat' and would be 'dog'"),
        (("cat", "dog", "emu"), "added 'emu'"),
    ],
)
def test_other_classes_are_refused_with_the_difference(tmp_path, now, message):
    begun(tmp_path, ("cat", "dog"))
    with pytest.raises(ValueError, match=rf"trained on other classes: {message}\. Bring"):
        dataset.check(tmp_path, *streams(now), labels=True)
    found = dataset.check(tmp_path, *streams(now), labels=False)  # nothing depends on the ids
    assert found.classes == now


def test_more_records_are_no_other_classes(tmp_path, caplog):
    begun(tmp_path, ("cat", "dog"))
    caplog.clear()
    found = dataset.check(tmp_path, *streams(("cat", "dog"), train=12), labels=True)
    dataset.keep(tmp_path, found, resumed=True)
    assert caplog.messages[0].startswith("changed on resume: train records 8 -> 12;")
    assert rundir.read_data(tmp_path)["records"] == {"train": 12, "eval": 2}


def test_a_run_of_before_is_told_once_and_keeps_the_names(tmp_path, caplog):
    for begins in (True, False):
        caplog.clear()
        found = dataset.check(tmp_path, *streams(("cat", "dog")), labels=True)
        dataset.keep(tmp_path, found, resumed=True)
        assert any("kept no names of its classes" in line for line in caplog.messages) == begins
    assert rundir.read_data(tmp_path)["classes"] == ["cat", "dog"]


def test_data_without_names_leave_those_of_the_run(tmp_path):
    """As a cache of before."""
    begun(tmp_path, ("cat", "dog"))
    found = dataset.check(tmp_path, *streams(None), labels=True)
    assert found.classes == ("cat", "dog")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "classes": [3]}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.json: .*; remove it$"):
        rundir.read_data(tmp_path)
    (tmp_path / "data.json").write_text('{"format": 2, "classes": null}')
    with pytest.raises(ValueError, match="format 2 is newer than 1"):
        rundir.read_data(tmp_path)


def test_a_folder_that_is_added_moves_the_ids_of_a_folder_source(tmp_path):
    """Why names are kept: the source itself cannot know."""

    def classes():
        config = schema.FolderConfig(str(tmp_path), str(tmp_path), class_from_folder=True)
        return data.open_source(schema.DataConfig(source=config), "train").classes

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    before = classes()
    (tmp_path / "ant").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "ant" / "1.png")
    assert (before, classes()) == (("cat", "dog"), ("ant", "cat", "dog"))
    assert dataset.difference(before, classes()).endswith("id 0 was 'cat' and would be 'ant'")
