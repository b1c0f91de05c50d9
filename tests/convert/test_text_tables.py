"""Tables of conditioning stages reach every tensor of the published models, and back."""

import jax
import jax.numpy as jnp
import pytest
from reference import released

from ldm_jax import schema
from ldm_jax.convert import table, text_tables
from ldm_jax.models import bert, clip, embedders

PREFIX = "cond_stage_model."
PUBLISHED = {
    "configs__latent-diffusion__cin256-v2": schema.ClassCondConfig(),
    "configs__latent-diffusion__txt2img-1p4B-eval": schema.TextCondConfig(),
    "ldm__text2img256": schema.TextCondConfig(schema.BERTTextConfig(width=640)),
    "ldm__layout2img-openimages256": schema.LayoutCondConfig(),
    "ldm__semantic_synthesis256": schema.SemanticCondConfig(),
}


def shapes(cond):
    ids = jnp.zeros((1, 1), jnp.int32)
    if isinstance(cond, schema.ClassCondConfig):
        module, ids = embedders.ClassEmbedder(cond.num_classes + 1, cond.embed_dim), ids[0]
    elif isinstance(cond, schema.SemanticCondConfig):
        module = embedders.SpatialRescaler(cond.num_classes, cond.stages, cond.out_channels)
        ids = jnp.zeros((1, 4, 4), jnp.int32)
    elif isinstance(cond.encoder, schema.CLIPTextConfig):
        module = clip.text_from_config(cond.encoder)
    else:
        module = bert.from_config(cond.encoder)
    return jax.eval_shape(module.init, jax.random.key(0), ids)["params"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts(name):
    cond, tensors = PUBLISHED[name], released()[name][1]
    tensors = {k.removeprefix(PREFIX): x for k, x in tensors.items() if k.startswith(PREFIX)}
    rows = text_tables.cond_stage(cond)
    params = table.from_torch(rows, tensors, shapes(cond))
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, shapes(cond))
    back = table.to_torch(rows, params)
    assert {k: x.shape for k, x in back.items()} == {k: x.shape for k, x in tensors.items()}


def test_clip_has_the_names_of_its_release():
    v1 = schema.CLIPTextConfig(num_layers=2)
    v2 = schema.CLIPTextConfig(num_layers=2, activation="gelu", layer="penultimate")
    hybrid = schema.HybridCondConfig(text=schema.TextCondConfig(v1))
    names = {row.torch for row in text_tables.cond_stage(hybrid)}
    assert "transformer.text_model.encoder.layers.1.self_attn.q_proj.weight" in names
    assert len(names) == 2 + 2 * 16 + 2
    stacked = {row.torch for row in text_tables.cond_stage(schema.TextCondConfig(v2))}
    assert "model.transformer.resblocks.1.attn.in_proj_weight" in stacked
    assert len(stacked) == 2 + 2 * 12 + 2
    for config in (v1, v2):
        cond = schema.TextCondConfig(config)
        table.to_torch(text_tables.cond_stage(cond), shapes(cond))  # every parameter has a row


@pytest.mark.parametrize(
    "cond",
    [
        None,
        schema.ClassCondConfig(via="label"),
        schema.SemanticCondConfig(out_channels=None),
        schema.EmbeddingCondConfig(),
        schema.InpaintCondConfig(),
    ],
)
def test_nothing_learned_has_no_entries(cond):
    assert text_tables.cond_stage(cond) == []
