"""A folder of transformers' CLIPModel: both embeddings equal its own."""

import json

import clip_model
import jax
import numpy as np
import pytest
import reference
from PIL import Image

from ldm_jax import neighbours
from ldm_jax.convert import clip_folder
from ldm_jax.convert.formats import safetensors_file
from ldm_jax.models import clip

END = 97
IDS = np.random.default_rng(0).integers(0, 90, (3, 9))
IDS[:, 8], IDS[0, 3], IDS[1, 5] = END, END, 99  # 99 is the highest, not the end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_model.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="torch is the reference here")
    return pytest.importorskip("transformers")


def theirs(transformers, folder, end_id):
    """CLIPModel with weights by formula, written to `folder`."""
    import torch

    options = clip_model.config(end_id)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=options["text_config"],
            vision_config=options["vision_config"],
            projection_dim=32,
        )
    ).eval()
    made = {name: reference.weight(name, tuple(x.shape)) for name, x in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(x) for name, x in made.items()})
    model.save_pretrained(folder)
    return model


@pytest.mark.torch
@pytest.mark.parametrize("end_id", [2, END])
def test_equals_transformers(transformers, tmp_path, end_id):
    import torch

    model = theirs(transformers, tmp_path, end_id)
    towers = clip_folder.load(tmp_path)
    pixels = reference.draw(3, 12, 12, 3)
    with torch.no_grad():
        texts = model.get_text_features(torch.tensor(IDS)).pooler_output.numpy()
        images = model.get_image_features(torch.tensor(pixels).permute(0, 3, 1, 2))
    embed = jax.jit(lambda p, x: clip.embed_text(towers.text, p, x, towers.end_id))
    found = embed(towers.params["text"], IDS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, texts, rtol=0, atol=1e-5)
    see = jax.jit(lambda p, x: towers.vision.apply({"params": p}, x))
    found = see(towers.params["vision"], pixels)
    np.testing.assert_allclose(found, images.pooler_output.numpy(), rtol=0, atol=1e-5)
    if end_id == END:  # what follows the first end has no part in it
        later = IDS.copy()
        later[0, 5] = 98
        np.testing.assert_allclose(embed(towers.params["text"], later)[0], texts[0], atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(12, 12), (31, 20), (9, 40)])
def test_images_are_prepared_as_by_transformers(transformers, size):
    kind = getattr(transformers, "CLIPImageProcessorPil", None)
    if kind is None:
        pytest.skip("this transformers has no image processor without torchvision")
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    process = kind(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    expected = process(Image.fromarray(values), return_tensors="np")["pixel_values"][0]
    found = neighbours.prepared(Image.fromarray(values), 12, clip.IMAGE_MEAN, clip.IMAGE_STD)
    np.testing.assert_allclose(found, expected.transpose(1, 2, 0), atol=1e-5)


def test_what_the_folder_says(folder):
    towers = clip_folder.load(folder)
    assert (towers.width, towers.end_id, towers.text.max_length) == (32, 2, 12)
    assert (towers.mean, towers.std) == (clip.IMAGE_MEAN, clip.IMAGE_STD)
    assert towers.tokenizer.encode(["red"]).shape == (1, 12)
    assert towers.vision.precision == "highest"


def test_normalization_of_the_image_processor(folder, tmp_path):
    copied(folder, tmp_path)
    said = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    towers = clip_folder.load(tmp_path)
    assert (towers.mean, towers.std) == ((0.5, 0.5, 0.5), (0.5, 0.25, 1.0))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": [1, 1, 0]}))
    with pytest.raises(ValueError, match=r"preprocessor_config.json: image_std=.* not positive"):
        clip_folder.load(tmp_path)


def test_the_config_of_old_counts_where_both_are(folder, tmp_path):
    copied(folder, tmp_path)
    options = clip_model.config()
    options["text_config_dict"], options["text_config"] = options["text_config"], {"hidden_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert clip_folder.load(tmp_path).text.width == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip_text_model"}, "config.json: model_type='clip_text_model'; give the"),
        ({"projection_dim": "a"}, "config.json: projection_dim='a' is no such number"),
        ({"projection_dim": 16}, r"visual_projection.weight is \(32, 32\), not \(16, 32\)"),
        ({"vision_config": []}, "vision_config is no object"),
        ({"vision_config": {"num_channels": 4}}, "not supported: num_channels=4"),
        ({"text_config": {"layer_norm_eps": 1.0}}, "not supported: layer_norm_eps=1.0"),
    ],
)
def test_a_config_that_does_not_fit(folder, tmp_path, change, message):
    copied(folder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**clip_model.config(), **change}))
    with pytest.raises(ValueError, match=message):
        clip_folder.load(tmp_path)


def test_weights_that_do_not_fit(folder, tmp_path):
    copied(folder, tmp_path)
    tensors = dict(safetensors_file.read(folder / "model.safetensors"))
    del tensors["text_projection.weight"]
    tensors["logit_scale"] = np.ones(1, np.float32)  # computes nothing, and is left
    safetensors_file.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"model.safetensors .*: missing text_projection.weight$"):
        clip_folder.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        clip_folder.load(tmp_path)


def copied(folder, to):
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
