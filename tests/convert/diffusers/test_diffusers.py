"""Models in folders that diffusers and transformers wrote compute what they computed."""

import functools
import json

import jax
import numpy as np
import pytest
from diffusers_modules import FIRST_STAGES, LAYER, UNETS, by_formula, made
from flax import linen as nn
from reference import draw, max_difference, nhwc

from ldm_jax.convert import diffusers, table
from ldm_jax.convert.diffusers import components, part_configs, tables, unet_config
from ldm_jax.convert.formats import safetensors_file
from ldm_jax.models import autoencoder, bert, clip, unet

torch = pytest.importorskip("torch", reason="torch is the reference here")
pytestmark = pytest.mark.torch


def nchw(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def unet_inputs(config, batch, height, width, tokens):
    labels = {"label": None}
    if config.num_classes is not None:
        labels = {"label": np.arange(batch) % config.num_classes}
    elif config.vector_dim is not None:
        labels = {"label": draw(batch, config.vector_dim)}
    return {
        "x": draw(batch, height, width, config.in_channels),
        "t_b": np.array([1, 981, 500])[:batch],
        "context_blc": draw(batch, tokens, 24, seed=2) if config.context_dim else None,
        **labels,
    }


def run_theirs(module, given):
    """(their output, {name: (first input, output)} of each of their layers), channels last."""
    seen = {}

    def keep(name):
        def hook(submodule, args, kwargs, out):
            out = getattr(out, "sample", out)
            pair = args[0] if args else kwargs["hidden_states"], out
            pair = (x[0] if isinstance(x, tuple) else x for x in pair)
            seen[name] = tuple(nhwc(x.numpy()) if x.ndim == 4 else x.numpy() for x in pair)

        return hook

    handles = [
        layer.register_forward_hook(keep(name), with_kwargs=True)
        for name, layer in module.named_modules()
        if LAYER.search(name)
    ]
    with torch.no_grad():
        more = {"class_labels": given["label"], "encoder_hidden_states": given["context_blc"]}
        more = {k: torch.tensor(v) for k, v in more.items() if v is not None}
        out = module(nchw(given["x"]), torch.tensor(given["t_b"]), **more).sample
    for handle in handles:
        handle.remove()
    return nhwc(out.numpy()), seen


def run_layers(model, params, given, inputs):
    """{name: output} of each of our layers, which gets `inputs` of its name."""

    def forward(params, given, inputs):
        outputs = {}

        def replace(following, args, kwargs, context):
            name = tables.NUMBERED.sub(r"\1.\2", ".".join(context.module.path))
            if context.method_name != "__call__" or name not in inputs:
                return following(*args, **kwargs)
            outputs[name] = following(inputs[name], *args[1:], **kwargs)
            return outputs[name]

        with nn.intercept_methods(replace):
            model.apply({"params": params}, **given)
        return outputs

    return jax.jit(forward)(params, given, inputs)


@pytest.fixture(scope="module")
def saved_unet(tmp_path_factory):
    """(their module, our module, our parameters) of UNETS, from a folder."""

    @functools.cache
    def load(name):
        folder = tmp_path_factory.mktemp("unet")
        theirs = made(*UNETS[name])
        theirs.save_pretrained(folder)
        params, config = diffusers.load_unet(folder)
        return theirs, unet.from_config(config, precision="highest"), params

    return load


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=() if quick else pytest.mark.slow)
        for name in UNETS
        for shape in ((3, 4, 6, 1), (1, 6, 10, 7))  # alone on odd shapes
        for quick in (shape[0] == 3 or name in ("sd1", "superres"),)
    ],
)
def test_unet_computes_the_same(name, shape, saved_unet):
    theirs, model, params = saved_unet(name)
    assert all(type(x) is np.ndarray and x.dtype == np.float32 for x in jax.tree.leaves(params))
    run = jax.jit(lambda params, given: model.apply({"params": params}, **given))
    given = unet_inputs(model, *shape)
    assert max_difference(run(params, given), run_theirs(theirs, given)[0]) <= 1e-4


def some(names, quick):
    """All names; those that are not in `quick` only where slow tests run."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some(UNETS, ("sd1", "depth", "upscaler", "resnet")))
def test_every_layer_computes_the_same(name, saved_unet):
    theirs, model, params = saved_unet(name)
    given = unet_inputs(model, 3, 4, 6, 5)
    _, seen = run_theirs(theirs, given)
    ours = run_layers(model, params, given, {layer: x for layer, (x, _) in seen.items()})
    assert ours.keys() == seen.keys()
    for layer, (_, expected) in seen.items():
        assert max_difference(ours[layer], expected) <= 1e-5, layer


@pytest.mark.parametrize(
    ("name", "batch", "height", "width"),
    [
        pytest.param(name, *shape, marks=() if quick else pytest.mark.slow)
        for name in FIRST_STAGES
        for shape in ((3, 4, 6), (1, 12, 4))
        for quick in (shape[0] == 3 or name == "kl attention",)
    ],
)
def test_first_stage_computes_the_same(name, batch, height, width, tmp_path):
    kind, options = FIRST_STAGES[name]
    theirs = made(kind, {**options, "scaling_factor": 0.3})
    theirs.save_pretrained(tmp_path)
    params, config = diffusers.load_first_stage(tmp_path)
    assert diffusers.first_stage_scale(tmp_path) == 0.3
    model = autoencoder.from_config(config, precision="highest")

    def both(params, image):
        encoded = model.apply({"params": params}, image, method="encode")
        z = encoded[0] if kind == "AutoencoderKL" else encoded
        return encoded, model.apply({"params": params}, z, method="decode")

    image = draw(batch, height, width, config.in_channels)
    with torch.no_grad():
        found = theirs.encode(nchw(image))
        if kind == "AutoencoderKL":
            z = found.latent_dist.mean
            expected = [z, found.latent_dist.logvar]
        else:
            expected = [z := found.latents]
        expected = [nhwc(x.numpy()) for x in (*expected, theirs.decode(z).sample)]
    encoded, decoded = jax.jit(both)(params, image)
    assert max_difference([*jax.tree.leaves(encoded), decoded], expected) <= 1e-4


def assert_same_text(theirs, model, params):
    for batch, tokens in ((1, 77), (3, 5)):
        ids = np.random.default_rng(0).integers(0, 39, (batch, tokens))
        with torch.no_grad():
            expected = theirs(torch.tensor(ids))[0].numpy()
        assert max_difference(jax.jit(model.apply)({"params": params}, ids), expected) <= 1e-4


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip_text_computes_the_same(activation, prefix, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    options = CLIPTextConfig(
        vocab_size=40, num_attention_heads=4, hidden_act=activation, eos_token_id=39, **sizes
    )
    theirs = by_formula(CLIPTextModel(options).eval())
    theirs.save_pretrained(tmp_path)
    names = {
        prefix + name.removeprefix("text_model."): x.numpy()
        for name, x in theirs.state_dict().items()
    }
    names[f"{prefix}embeddings.position_ids"] = np.arange(77)[None]  # as old files have it
    safetensors_file.write(tmp_path / "model.safetensors", names)
    params, config = diffusers.load_text_encoder(tmp_path)
    assert_same_text(theirs, clip.text_from_config(config, precision="highest"), params)


def test_bert_computes_the_same(tmp_path):
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as theirs

    options = theirs.LDMBertConfig(
        vocab_size=40, encoder_layers=2, encoder_ffn_dim=96, encoder_attention_heads=2, head_dim=8,
        d_model=24,
    )  # fmt: skip
    module = by_formula(theirs.LDMBertModel(options).eval())
    module.save_pretrained(tmp_path)
    params, config = diffusers.load_text_encoder(tmp_path)
    assert_same_text(module, bert.from_config(config, precision="highest"), params)


# --- real sizes, by shape ------------------------------------------------------------------------

REAL = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "upscaler": {
        "in_channels": 7, "block_out_channels": [256, 512, 512, 1024],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
        "only_cross_attention": [True, True, True, False], "cross_attention_dim": 1024,
        "use_linear_projection": True, "num_class_embeds": 1000,
    },
    "celeba": {"attention_head_dim": 32},
    "kl-f8": {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "vq-f8": {
        "block_out_channels": [128, 256, 256, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
        "num_vq_embeddings": 16384,
        "latent_channels": 4,
    },
}  # fmt: skip
CLASSES = {"celeba": "UNet2DModel", "kl-f8": "AutoencoderKL", "vq-f8": "VQModel"}


@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_of_real_models(name):
    import diffusers as theirs

    kind = CLASSES.get(name, "UNet2DConditionModel")
    with torch.device("meta"):
        module = getattr(theirs, kind)(**REAL[name])
    options = json.loads(module.to_json_string())
    if "UNet" in kind:
        part = components.unet_part(unet_config.unet_config(options, name))
    else:
        config, _ = part_configs.first_stage_config(options, name)
        part = components.first_stage_part(config)
    ours = table.to_torch(part.entries(None), part.shapes)
    shapes = {k: tuple(x.shape) for k, x in module.state_dict().items()}
    assert {k: tuple(x.shape) for k, x in ours.items()} == shapes
