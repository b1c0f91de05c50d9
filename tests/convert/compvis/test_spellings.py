"""Files of Stable Diffusion as other programs write them: the same model under other names."""

import dataclasses
import re

import checkpoints
import families
import jax
import numpy as np
import pytest
import recipes
import reference
import yaml

from ldm_jax import bundle, schema
from ldm_jax.convert import compvis
from ldm_jax.convert.compvis import single_file, spellings
from ldm_jax.convert.compvis.selection import ema_name
from ldm_jax.convert.formats import files, safetensors_file
from ldm_jax.runtime.log import LOG

NEW = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn", "norm": "group_norm"}
ATTENTION = re.compile(r"(first_stage_model\..*\.attn(?:_|\.)\d\.)(q|k|v|proj_out|norm)(\..*)")


@pytest.fixture(scope="module")
def tensors():
    """A file of version 1 with averaged weights."""
    return checkpoints.stable_diffusion()[1]


@pytest.fixture(scope="module")
def whole(tensors, tmp_path_factory):
    """The model of it."""
    return opened(tensors, tmp_path_factory.mktemp("whole"))[0]


def opened(tensors, folder, metadata=None, **options):
    """(model of a bare file, what was said)"""
    safetensors_file.write(folder / "bare.safetensors", tensors, metadata or {})
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOG, "info", said.append)
        model = compvis.load(folder / "bare.safetensors", **options)
    return model, "\n".join(said)


def attention(names, dense):
    """Change names of the first stage's attention, and 1x1 convolutions to dense layers."""

    def change(tensors):
        changed = {}
        for name, x in tensors.items():
            match = ATTENTION.fullmatch(name)
            if match and dense and x.ndim == 4:
                x = x[..., 0, 0]
            changed[f"{match[1]}{names.get(match[2], match[2])}{match[3]}" if match else name] = x
        assert changed.keys() != tensors.keys() or not names
        return changed

    return change


def dense_projections(tensors):
    return {n: x[..., 0, 0] if ".proj_in.weight" in n else x for n, x in tensors.items()}


def both_texts(tensors):
    short = {n.replace("transformer.text_model.", "transformer."): x for n, x in tensors.items()}
    return {n: 2 * x for n, x in short.items() if "cond_stage_model" in n} | tensors


def averaged_first_stage(tensors):
    stage = [n for n in tensors if n.startswith(checkpoints.FIRST_STAGE)]
    names = {n: n.removeprefix(checkpoints.FIRST_STAGE).replace(".", "") for n in stage}
    return tensors | {f"first_stage_model.model_ema.{names[n]}": 2 * tensors[n] for n in stage}


def second_text_encoder(tensors):
    more = {"model.ln_final.weight": (128,), "model.token_embedding.weight": (50, 128)}
    return tensors | checkpoints.filled(more, checkpoints.COND_STAGE)


CHANGES = {
    "attention of today's diffusers": attention(NEW, dense=True),
    "attention of 2022": attention(OLD, dense=False),
    "dense attention": attention({}, dense=True),
    "dense projections": dense_projections,
    "both spellings of the text": both_texts,
    "average of the first stage": averaged_first_stage,
    "two text encoders": second_text_encoder,
    "DataParallel": lambda tensors: {f"module.{n}": x for n, x in tensors.items()},
    "averages alone": lambda t: {n: x for n, x in t.items() if not n.startswith(checkpoints.UNET)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_spelling_is_the_same_model(tensors, whole, name, tmp_path):
    model, said = opened(CHANGES[name](tensors), tmp_path)
    # a projection is a dense layer or a 1x1 convolution, as the file has it
    params = jax.tree.map(lambda x, like: x.reshape(like.shape), model.params, whole.params)
    recipes.assert_same_bits(params, whole.params)
    assert dataclasses.replace(model.config.unet, linear_projection=False) == whole.config.unet
    assert model.config.cond == whole.config.cond
    for words, line in (
        ("both", "tensors in another spelling"),
        ("average of", "averaged weights of another part"),
        ("two", "a second text encoder (2)"),
    ):
        assert (line in said) == name.startswith(words)


def test_the_raw_weights_of_averages_alone_are_not_there(tensors, tmp_path):
    alone = CHANGES["averages alone"](tensors)
    with pytest.raises(ValueError, match="holds averaged weights alone"):
        opened(alone, tmp_path, ema=False)


@pytest.mark.parametrize(
    "name", ["unet_txt2img", "unet_churches", "unet_cin", "unet_adm_class", "unet_semantic"]
)
def test_names_come_back_from_averages(name):
    names = [checkpoints.UNET + n for n in checkpoints.golden(name)[1]]
    names += [checkpoints.UNET + n for n in ("label_emb.0.2.bias", "input_blocks.11.0.op.weight")]
    averages = dict.fromkeys(map(ema_name, names))
    assert list(spellings.with_unet_names(averages)) == names
    assert list(spellings.with_unet_names({"model_ema.diffusion_modelsurprise0": 1})) == [
        "model_ema.diffusion_modelsurprise0"
    ]


# --- what a file says of its objective ------------------------------------------------------------


def mark(*names):
    return dict.fromkeys(names, np.zeros(0, np.float32))


def said_by(tensors, metadata=None, variant=None):
    """(objective, guesses) of a bare file, from names and shapes alone."""
    tensors, marked = spellings.markers(tensors, metadata or {})
    found = single_file.recognize(tensors, variant, marked.prediction)
    return found.config.diffusion.prediction, [g for g in found.guesses if "predicts" in g]


def test_markers_are_followed(tensors, tmp_path):
    model, said = opened(tensors | mark("v_pred", "ztsnr"), tmp_path, shapes_only=True)
    assert model.config.diffusion == schema.DiffusionConfig(prediction="v", zero_terminal_snr=True)
    assert "it predicts v, to noise alone (--spacing trailing starts there): the file holds" in said
    assert said_by(tensors | mark("v_pred")) == ("v", [])
    assert said_by(tensors, {"modelspec.prediction_type": "v"}) == ("v", [])
    assert said_by(tensors, {"modelspec.prediction_type": "epsilon"}) == ("eps", [])
    assert said_by(tensors | mark("v_pred"), variant="eps") == ("eps", [])


def test_the_variant_of_a_finetune_that_predicts_v(tensors):
    assert said_by(tensors, variant="v") == ("v", [])
    prediction, (guess,) = said_by(tensors)
    assert prediction == "eps"
    assert "variant v is for a model that was trained to predict v" in guess


def test_markers_hold_against_a_yaml(tensors, tmp_path):
    section = checkpoints.stable_diffusion()[0]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"model": section}))
    options = {"yaml_path": tmp_path / "x.yaml", "shapes_only": True}
    model, said = opened(tensors | mark("v_pred"), tmp_path, **options)
    assert model.prediction == "v"
    assert "it predicts v (instead of eps): the file holds v_pred" in said


# --- the project's own files ----------------------------------------------------------------------


def filled(config):
    """A model of a family with numbers by name."""
    built = bundle.build(config, {}, 0.08333 if config.unet.num_classes else 0.18215)
    return dataclasses.replace(built, params=reference.filled(compvis.model_shapes(built)))


def variants():
    """Families, and those whose objective is not the usual one."""
    one, two = families.FAMILIES["Stable Diffusion 1"], families.FAMILIES["Stable Diffusion 2"]
    base = dataclasses.replace(two, diffusion=families.EPS, size=128)
    return families.FAMILIES | {"1 v": dataclasses.replace(one, diffusion=families.V), "2": base}


@pytest.mark.parametrize("family", variants())
def test_our_files_without_their_yaml(family, tmp_path):
    model = filled(variants()[family])
    compvis.save(model, tmp_path / "own.safetensors")
    state_dict, info = files.open_state_dict(tmp_path / "own.safetensors")
    tensors, marked = spellings.markers(spellings.common(state_dict)[0], info.metadata)
    found = single_file.recognize(tensors, None, marked.prediction)
    assert (found.config, found.scale) == (model.config, model.latent_scale)
    names = {entry.torch for entry in compvis.model_entries(model)}
    assert tensors.keys() == names


def test_our_ckpt_without_its_yaml(tmp_path):
    """Read whole; it marks what it predicts."""
    model = filled(variants()["1 v"])
    compvis.save(model, tmp_path / "own.ckpt")
    (tmp_path / "own.yaml").unlink()
    again = compvis.load(tmp_path / "own.ckpt")
    assert again.config == model.config
    recipes.assert_same_bits(again.params, model.params)
