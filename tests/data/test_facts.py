"""What a config may know of a folder of images before its options are parsed."""

import pytest
from PIL import Image

from ldm_jax import data, schema
from ldm_jax.train import main
from ldm_jax.train.prepare import pack


def write(path, colour, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), colour).save(path)


@pytest.fixture
def grey(tmp_path):
    """Three classes of grey images: some stored as grey, some as RGB; one file is no image."""
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}/0.png", 7, "L")
        write(tmp_path / f"{name}/1.png", (9, 9, 9))
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    return tmp_path


def test_grey_unless_one_image_has_colour(grey):
    assert data.facts_of(str(grey)) == schema.ImageFacts(channels=1, num_classes=3)
    write(grey / "c/3.png", (9, 9, 8))
    assert data.facts_of(str(grey)).channels == 3


def test_images_beside_each_other_have_no_classes(tmp_path):
    write(tmp_path / "0.png", "red")
    write(tmp_path / "1.png", "red")
    assert data.facts_of(str(tmp_path)) == schema.ImageFacts()


def test_a_packed_folder_is_looked_at_too(grey, tmp_path_factory):
    packed = str(tmp_path_factory.mktemp("packed"))
    source = schema.FolderConfig(path=str(grey), class_from_folder=True)
    assert pack.pack(schema.DataConfig(source=source), packed, 4) == 0
    assert data.facts_of(packed) == schema.ImageFacts(channels=1, num_classes=3)


@pytest.mark.parametrize("form", ["--data.source.path {}", "--data.source.path={}"])
def test_the_path_is_all_that_a_config_needs(grey, form):
    argv = ["--workdir", "w", "--seed", "1", *form.format(grey).split()]
    first = main.parse(main.load_config("own:first_stage", argv), argv, "ldm-train")[1]
    assert (first.data.channels, first.model.in_channels, first.model.out_channels) == (1, 1, 1)
    config = main.parse(main.load_config("own:class", argv), argv, "ldm-train")[1]
    assert (config.cond.num_classes, config.data.channels) == (3, 1)
    assert config.data.source.path == str(grey)
    assert config.seed == 1
    assert main.load_config("own").data.channels == 3  # nothing to look at, as for --help


def test_a_path_to_nothing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone' is not a folder here"):
        main.load_config("own", ["--data.source.path", str(tmp_path / "gone")])
