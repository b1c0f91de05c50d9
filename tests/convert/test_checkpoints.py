"""Whole checkpoints as they are published, with all that stands beside the model in the file."""

import re

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from ldm_jax import schema, sharding
from ldm_jax.convert import compvis
from ldm_jax.convert.formats import safetensors_file
from ldm_jax.runtime.log import LOG

MODELS = {
    "churches": checkpoints.churches,
    "inpainting_big": checkpoints.inpainting_big,
    "stable_diffusion": checkpoints.stable_diffusion,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """NAME.safetensors and NAME.yaml of every model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, make in {**MODELS, "vq": checkpoints.standalone_first_stage}.items():
        model, tensors = make()
        safetensors_file.write(folder / f"{name}.safetensors", tensors)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"model": model}))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    """name -> (bundle, what was printed)"""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOG, "info", said.append)
        found = {}
        for name in MODELS:
            said.clear()
            model = compvis.load(folder / f"{name}.safetensors", folder / f"{name}.yaml")
            found[name] = model, "\n".join(said)
    return found


def expected(name, *, ema):
    """Parameters of a model, part by part, from the tensors that belong to it."""
    model, tensors = MODELS[name]()
    options = model["params"]
    unet = {n: x for n, x in tensors.items() if n.startswith(checkpoints.UNET)}
    if ema:
        raw = {n.removeprefix("model.").replace(".", ""): n for n in unet}
        averaged = {n: x for n, x in tensors.items() if n.startswith("model_ema.diff")}
        unet = {raw[n.removeprefix("model_ema.")]: x for n, x in averaged.items()}
    first_stage = {n: x for n, x in tensors.items() if n.startswith(checkpoints.FIRST_STAGE)}
    return {
        "unet": compvis.load_unet(options["unet_config"]["params"], unet)[1],
        "first_stage": compvis.load_first_stage(
            options["first_stage_config"]["params"], first_stage
        )[1],
    }


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_arrives(loaded, name):
    model, _ = loaded[name]
    wanted = expected(name, ema=name != "inpainting_big")
    for part, params in wanted.items():
        assert same(model.params[part], params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(model.params))
    assert set(model.params) == {"unet", "first_stage", "cond_stage"}


AVERAGE = {"bookkeeping of the moving average": 2}


@pytest.mark.parametrize(
    ("name", "choice", "left"),
    [
        ("churches", "averaged weights; it holds both", AVERAGE | {"raw weights": 162}),
        ("inpainting_big", "weights as they are: it holds no moving average",
         {"second copy of the first stage": 153}),
        ("stable_diffusion", "averaged weights; it holds both",
         AVERAGE | {"raw weights": 286, "position ids": 1}),
    ],
)  # fmt: skip
def test_the_choice_and_what_is_left_are_printed(loaded, name, choice, left):
    said = loaded[name][1]
    assert f"{name}.safetensors: takes the {choice}" in said
    counts = re.findall(r"([a-z][a-z ]*) \((\d+)\)", said.split("not needed: ")[1])
    assert {what: int(n) for what, n in counts} == {"schedule buffers": 12, **left}


def test_churches_scale_is_in_the_file(loaded):
    model, said = loaded["churches"]
    assert model.latent_scale == np.float32(0.22)
    assert "its own latent scale is 0.22" in said
    assert model.config.diffusion.loss == "l1"
    assert (model.config.cond, model.config.size) == (None, 64)


def test_inpainting_reads_the_masked_image(loaded):
    model, _ = loaded["inpainting_big"]
    assert model.config.cond == schema.InpaintCondConfig()
    assert isinstance(model.config.first_stage, schema.AutoencoderVQConfig)
    assert (model.cond_stage, model.latent_scale) == (None, 1.0)


def test_raw_weights_where_asked(folder):
    path = folder / "churches.safetensors"
    model = compvis.load(path, path.with_suffix(".yaml"), ema=False)
    assert same(model.params["unet"], expected("churches", ema=False)["unet"])


def test_a_bare_single_file_is_recognised(folder, loaded, capsys, shown):
    by_yaml, _ = loaded["stable_diffusion"]
    model = compvis.load(folder / "stable_diffusion.safetensors")
    said = capsys.readouterr().err
    assert "Stable Diffusion 1, by its names and shapes" in said
    assert "a guess: it was trained on images of 512 pixels" in said
    assert same(model.params, by_yaml.params)
    assert model.latent_scale == 0.18215
    assert model.config.size == 512
    assert model.config.unet == by_yaml.config.unet
    assert model.config.cond == by_yaml.config.cond
    assert model.config.cond.encoder.num_layers == 2
    assert model.config.diffusion == schema.DiffusionConfig()


def test_names_without_text_model(folder, loaded, tmp_path):
    _, tensors = checkpoints.stable_diffusion()
    path = tmp_path / "short.safetensors"
    short = {n.replace("transformer.text_model.", "transformer."): x for n, x in tensors.items()}
    safetensors_file.write(path, short)
    model = compvis.load(path, folder / "stable_diffusion.yaml")
    assert same(model.params, loaded["stable_diffusion"][0].params)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_read_back(loaded, name, tmp_path):
    model, _ = loaded[name]
    path = tmp_path / "model.safetensors"
    compvis.save(model, path)
    written = safetensors_file.read(path)
    _, tensors = MODELS[name]()
    parts = (checkpoints.UNET, checkpoints.FIRST_STAGE, checkpoints.COND_STAGE)
    names = {n for n in tensors if n.startswith(parts) and not n.endswith("position_ids")}
    if name == "inpainting_big":
        names = {n for n in names if not n.startswith(checkpoints.COND_STAGE)}
    assert set(written) == names
    assert all(written[n].shape == tensors[n].shape for n in names)
    again = compvis.load(path, path.with_suffix(".yaml"))
    assert same(again.params, model.params)
    assert (again.config, again.latent_scale) == (model.config, model.latent_scale)


@pytest.mark.parametrize(
    ("name", "dtype", "as_read"),
    [("a.safetensors", jnp.bfloat16, jnp.bfloat16), ("a.ckpt", jnp.float16, jnp.float32)],
)
def test_saved_in_half_precision(loaded, tmp_path, name, dtype, as_read):
    model, _ = loaded["inpainting_big"]
    compvis.save(model, tmp_path / name, dtype=dtype)
    if name == "a.safetensors":
        assert {x.dtype for x in safetensors_file.read(tmp_path / name).values()} == {
            np.dtype(dtype)
        }
    again = compvis.load(tmp_path / name, tmp_path / "a.yaml", param_dtype=as_read)
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(as_read), model.params)
    assert same(again.params, rounded)


def test_another_ending_is_refused(loaded, tmp_path):
    with pytest.raises(ValueError, match=r"model\.bin: is written as \.safetensors or \.ckpt"):
        compvis.save(loaded["churches"][0], tmp_path / "model.bin")


def test_shapes_alone(folder, loaded):
    path = folder / "churches.safetensors"
    model = compvis.load(path, path.with_suffix(".yaml"), shapes_only=True)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded["churches"][0].params
    )
    assert model.params == wanted


def test_shards_of_a_mesh(folder):
    mesh = sharding.make_mesh(schema.MeshConfig(data=2, fsdp=2))
    path = folder / "stable_diffusion.safetensors"
    model = compvis.load(path, mesh=mesh)
    rules = sharding.by_rules(model.params, sharding.RULES, mesh)
    leaves = zip(jax.tree.leaves(model.params), jax.tree.leaves(rules), strict=True)
    assert all(x.sharding == rule for x, rule in leaves)
    kernel = model.params["unet"]["mid_block"]["resnets_0"]["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[-1] * 2 == kernel.shape[-1]
    wanted = expected("stable_diffusion", ema=True)["unet"]["mid_block"]["resnets_0"]
    np.testing.assert_array_equal(kernel, wanted["conv1"]["kernel"])


@pytest.mark.parametrize("beside", [True, False])
def test_a_first_stage_of_its_own(folder, beside):
    path = folder / "vq.safetensors"
    params, config = compvis.load_first_stage_file(
        path, path.with_suffix(".yaml") if beside else None
    )
    model, tensors = checkpoints.standalone_first_stage()
    tensors = {n: x for n, x in tensors.items() if not n.startswith("loss.")}
    _, wanted = compvis.load_first_stage(model["params"], tensors)
    assert same(params, wanted)
    assert config.num_codes == 64


def test_a_file_without_a_first_stage(tmp_path):
    safetensors_file.write(tmp_path / "x.safetensors", {"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"x\.safetensors: holds no first stage"):
        compvis.load_first_stage_file(tmp_path / "x.safetensors")


def test_the_first_stage_of_a_model(folder, loaded):
    path = folder / "inpainting_big.safetensors"
    for config in (path.with_suffix(".yaml"), None):
        params, found = compvis.load_first_stage_file(path, config)
        assert same(params, loaded["inpainting_big"][0].params["first_stage"])
        assert found == loaded["inpainting_big"][0].config.first_stage


# --- what does not fit ---------------------------------------------------------------------------


def broken(tmp_path, name, change):
    """A model's files after `change(model section, tensors)`."""
    model, tensors = MODELS[name]()
    change(model, tensors)
    safetensors_file.write(tmp_path / "broken.safetensors", tensors)
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump({"model": model}))
    return tmp_path / "broken.safetensors", tmp_path / "broken.yaml"


def test_one_error_lists_all_parts(tmp_path):
    def change(model, tensors):
        tensors["control_model.zero.weight"] = np.zeros(1, np.float32)
        del tensors["first_stage_model.quant_conv.bias"]
        tensors["model.diffusion_model.out.2.bias"] = np.zeros(5, np.float32)
        tensors["cond_stage_model.encoder.surprise"] = np.zeros(1, np.float32)

    with pytest.raises(ValueError, match=r"broken\.safetensors does not fit the config") as error:
        compvis.load(*broken(tmp_path, "inpainting_big", change))
    message = str(error.value)
    assert "missing first_stage_model.quant_conv.bias" in message
    assert "unknown control_model.zero.weight" in message
    assert "unknown cond_stage_model.encoder.surprise" in message
    assert "model.diffusion_model.out.2.bias is (5,), not (3,)" in message


def test_half_a_moving_average_is_refused(tmp_path):
    def change(model, tensors):
        del tensors["model_ema.diffusion_modelinput_blocks00weight"]

    path, config = broken(tmp_path, "churches", change)
    with pytest.raises(ValueError, match=r"not whole .*missing model_ema\.diffusion_modelinput"):
        compvis.load(path, config)
    compvis.load(path, config, ema=False)


def test_averaged_weights_alone(tmp_path, loaded):
    def change(model, tensors):
        for name in [n for n in tensors if n.startswith(checkpoints.UNET)]:
            del tensors[name]

    model = compvis.load(*broken(tmp_path, "churches", change))
    assert same(model.params, loaded["churches"][0].params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: t.pop("scale_factor"), "scale_by_std, but it has no scale_factor"),
        (lambda m, t: m["params"].update(surprise=1), r"broken\.yaml: model: unknown: surprise"),
        (lambda m, t: m["params"].update(parameterization="flow"), "parameterization='flow'"),
        (lambda m, t: m.update(target="ddpm.DDPM"), "model.target 'ddpm.DDPM' is not one of"),
        (lambda m, t: m["params"].update(unet_config=None), r"broken\.yaml: "),
        (lambda m, t: m["params"]["unet_config"]["params"].update(in_channels=5), "set it to 4"),
        (lambda m, t: m["params"].update(image_size=[8, 8], channels=9), None),
    ],
)
def test_yaml_that_cannot_be_kept(tmp_path, change, message):
    files = broken(tmp_path, "churches", change)
    if message is None:
        assert compvis.load(*files).config.size == 64
        return
    with pytest.raises(ValueError, match=message):
        compvis.load(*files)


def test_a_file_without_yaml_that_is_not_stable_diffusion(folder):
    with pytest.raises(ValueError, match=r"churches.*not recognised .*cond_stage_model.*--config"):
        compvis.load(folder / "churches.safetensors")
    path = folder / "stable_diffusion.safetensors"
    with pytest.raises(ValueError, match="variant='v2-v': its tensors tell"):
        compvis.load(path, variant="v2-v")
    with pytest.raises(ValueError, match=r"variant='v2', but .*\.yaml says what it is"):
        compvis.load(path, path.with_suffix(".yaml"), variant="v2")


# --- PyTorch files -------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["churches", "stable_diffusion"])
def test_lightning_checkpoints(loaded, name, zipped, tmp_path, capsys, shown):
    import torch

    model, tensors = MODELS[name]()
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    path = tmp_path / "model.ckpt"
    torch.save(checkpoints.lightning(tensors), path, _use_new_zipfile_serialization=zipped)
    capsys.readouterr()
    found = compvis.load(path, tmp_path / "model.yaml")
    beside = "beside the state dict: epoch, global_step, pytorch-lightning_version, callbacks,"
    assert f"{beside} optimizer_states, lr_schedulers" in capsys.readouterr().err
    assert same(found.params, loaded[name][0].params)
    assert found.latent_scale == loaded[name][0].latent_scale


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("-inf")])
def test_a_latent_scale_of_nothing_is_refused(tmp_path, scale):
    path = tmp_path / "model.ckpt"
    with pytest.raises(ValueError, match=r"model\.ckpt: scale_factor .* is not a finite number"):
        compvis.checkpoints._take_scale(path, scale, {})
    with pytest.raises(ValueError, match=r"model\.ckpt: scale_factor .* is not a finite number"):
        compvis.checkpoints._take_scale(path, 0.18, {"scale_factor": np.float32(scale)})
