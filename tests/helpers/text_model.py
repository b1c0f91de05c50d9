"""A tiny model of text with random weights, and tokenizers of CLIP and BERT with few words."""

import dataclasses
import json

import jax
import reference

from ldm_jax import bundle, conditioning, schema
from ldm_jax.data import tokens
from ldm_jax.models import autoencoder, unet

ENCODER = schema.CLIPTextConfig(
    vocab_size=600, max_length=12, width=32, num_layers=2, num_heads=4, mlp_width=64
)


def make(tokenizer=None, encoder=ENCODER) -> bundle.LatentDiffusion:
    """Latents of 8x8x4, a text encoder that does not train, and bytes as tokens by default."""
    config = schema.LatentDiffusionConfig(
        first_stage=schema.AutoencoderKLConfig(
            channels=32, channel_mult=(1, 1), num_res_blocks=1, mid_attention=True
        ),
        unet=schema.UNetConfig(
            model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_downsample=(1,),
            num_heads=2, context_dim=32,
        ),
        cond=schema.TextCondConfig(encoder=encoder, trainable=False),
        size=16,
    )  # fmt: skip
    empty = bundle.build(config, {}, 0.5)
    shapes = {
        "unet": shapes_of(empty.unet, unet),
        "first_stage": shapes_of(empty.first_stage, autoencoder),
        "cond_stage": jax.eval_shape(
            lambda: conditioning.init(config.cond, empty.cond_stage, jax.random.key(0))
        ),
    }
    known = tokens.load_tokenizer(tokenizer or "bytes", encoder.max_length)
    return dataclasses.replace(empty, params=reference.filled(shapes), tokenizer=known)


def shapes_of(module, source):
    """Shapes of the parameters of a module that is made in `source`."""
    return jax.eval_shape(module.init, jax.random.key(0), *source.example_inputs(module))["params"]


def clip_tokenizer(folder, max_length=16, pad="<|endoftext|>"):
    """Writes CLIPTokenizer's files, of bytes and a few merges; returns the folder."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["r e", "re d</w>", "b l", "bl u", "blu e</w>", "s q", "sq u", "squ a"]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [m.replace(" ", "") for m in merges]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def bert_tokenizer(folder):
    """Writes BertTokenizer's files, of a few words and letters; returns the folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "square", "disc"]
    words += [chr(c) for c in range(ord("b"), ord("z") + 1)]
    words += ["##" + chr(c) for c in range(ord("a"), ord("z") + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return folder
