"""Configs survive JSON, name what is wrong, and know which of their differences matter."""

import dataclasses
import json
import typing

import pytest

from ldm_jax import schema
from ldm_jax.configs import digits, tiny
from ldm_jax.schema import mark, serialize

CONFIGS = [digits.get_config(s) for s in ("first_stage", "ldm")]
CONFIGS += [tiny.get_config(s) for s in ("first_stage", *tiny.CONDITIONS)]
BASE = tiny.get_config("class")


@pytest.mark.parametrize("config", CONFIGS)
def test_json_gives_an_equal_config(config):
    again = serialize.from_json(serialize.to_json(config))
    assert again == config
    assert hash(again) == hash(config)


def every_class() -> list[type]:
    return [c for c in vars(schema).values() if dataclasses.is_dataclass(c)]


@pytest.mark.parametrize("cls", every_class())
def test_defaults_survive_json(cls):
    assert serialize.from_json(serialize.to_json(cls())) == cls()


@pytest.mark.parametrize("cls", every_class())
def test_classes_are_frozen_and_named_config(cls):
    found_not_chosen = cls is schema.ImageFacts
    assert cls.__name__.endswith("Config") != found_not_chosen
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), dataclasses.fields(cls)[0].name, None)


def edited(path: str, value) -> str:
    """config.json of BASE with the field at `path` (a.b.c) set to `value`."""
    values = json.loads(serialize.to_json(BASE))
    inner = values["config"]
    *parents, last = path.split(".")
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("unet.widht", 3, r"config\.unet: UNetConfig has no field 'widht' \(it has .*model_ch"),
        ("unet.model_channels", 32.5, r"config\.unet\.model_channels: 32\.5 is not a int"),
        ("unet.model_channels", True, r"config\.unet\.model_channels: True is not a int"),
        ("unet.dropout", "0.1", r"config\.unet\.dropout: '0\.1' is not a float"),
        ("unet.dropout", True, r"config\.unet\.dropout: True is not a float"),
        ("unet.channel_mult", [1, "2"], r"config\.unet\.channel_mult\[1\]: '2' is not a int"),
        ("unet.channel_mult", 2, r"config\.unet\.channel_mult: 2 is not a tuple"),
        ("data.crop_range", [0.1], r"config\.data\.crop_range: \[0\.1\] is not a tuple"),
        ("data.crop", "left", r"config\.data\.crop: 'left' is not a Literal"),
        ("data.channels", 2, r"config\.data\.channels: 2 is not a Literal"),
        ("seed", None, r"config\.seed: None is not a int"),
        ("cond", {"class": "TextConfig"}, r"config\.cond: 'TextConfig' is not one of .*UNetConfig"),
        ("cond", {"class": "UNetConfig"}, r"config\.cond: .* is not a "),
        ("unet", {"class": "EMAConfig"}, r"config\.unet: .* is not a UNetConfig"),
        ("unet", 3, r"config\.unet: 3 is not one of "),
    ],
)
def test_wrong_fields_are_named(path, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        serialize.from_json(edited(path, value))


def test_json_may_write_floats_as_integers():
    again = serialize.from_json(edited("optimizer.learning_rate", 1))
    assert type(again.optimizer.learning_rate) is float
    assert again.optimizer.learning_rate == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (json.dumps({"format": serialize.FORMAT + 1, "config": {}}),
         "here: format 2 is newer than 1"),
        (json.dumps({"_class_name": "UNet2DConditionModel"}), "here: not a config written by"),
        (json.dumps([1]), "here: not a config written by"),
        ('{"format": 1, "conf', "here: is damaged, not JSON"),
    ],
)  # fmt: skip
def test_other_files_are_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        serialize.from_json(text, "here")


def test_difference_separates_identity_from_execution():
    changed = dataclasses.replace(
        BASE,
        steps=99,
        batch_size=16,
        mesh=schema.MeshConfig(fsdp=2),
        unet=dataclasses.replace(BASE.unet, dropout=0.5),
        data=dataclasses.replace(BASE.data, threads=7, flip=False),
    )
    identity, execution = serialize.difference(BASE, changed)
    flip, dropout = "data.flip: True -> False", "unet.dropout: 0.0 -> 0.5"
    assert identity == [flip, "batch_size: 8 -> 16", dropout]
    assert execution == ["data.threads: 2 -> 7", "steps: 8 -> 99", "mesh.fsdp: 1 -> 2"]
    assert serialize.difference(BASE, BASE) == ([], [])


def test_another_kind_of_conditioning_is_one_difference():
    changed = dataclasses.replace(BASE, cond=None)
    identity, execution = serialize.difference(BASE, changed)
    assert len(identity) == 1
    assert identity[0].startswith("cond: ClassCondConfig(")
    assert execution == []


def test_what_may_change_on_resume():
    """The list is a promise: a field that moves between the two kinds is a new format."""
    fields = dataclasses.fields(schema.LatentDiffusionTrainConfig)
    execution = {f.name for f in fields if "execution" in f.metadata}
    assert execution == {
        "steps", "accumulate", "mesh", "intervals", "max_to_keep", "max_failed_saves",
        "max_bad_steps", "spikes", "eval_batches", "sampling", "num_samples", "sample_steps",
        "sample_guidance", "remat", "attention", "deterministic", "cache", "profile", "watch",
        "wandb", "sample_prompts", "init_from",
    }  # fmt: skip
    data = {f.name for f in dataclasses.fields(schema.DataConfig) if "execution" in f.metadata}
    assert data == {"threads", "workers", "read_ahead", "keep_mib"}


def test_every_field_has_a_type_that_json_can_check():
    for cls in every_class():
        hints = typing.get_type_hints(cls)
        assert set(hints) == {f.name for f in dataclasses.fields(cls)}
        assert typing.Any not in hints.values()


def test_a_field_added_later_changes_no_hash():
    """Neither the one over fields that differ from their defaults, nor that of old programs."""
    model = schema.LatentDiffusionConfig(unet=schema.UNetConfig(channel_mult=(1, 2)))
    assert serialize.difference_from_defaults(model) == {
        "class": "LatentDiffusionConfig",
        "unet": {"class": "UNetConfig", "channel_mult": [1, 2]},
    }
    values = json.loads(serialize.to_json(model))
    assert values["config"]["sampling"].pop("rule") == "compvis"  # added in December 2026
    assert json.loads(serialize.old_to_json(model)) == values
    younger = dataclasses.make_dataclass(
        "UNetConfig", [("depth", int, mark.later(0))], bases=(schema.UNetConfig,), frozen=True
    )
    unet = younger(channel_mult=(1, 2))
    assert "depth" in serialize.to_dict(unet)
    for of in (serialize.difference_from_defaults, serialize.old_to_json):
        assert of(dataclasses.replace(model, unet=unet)) == of(model)
        assert of(dataclasses.replace(model, unet=dataclasses.replace(unet, depth=1))) != of(model)
