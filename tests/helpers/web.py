"""A server of tiny models, and a client in the same process."""

import base64
import io
import json

import jax
import numpy as np
import text_model
from fastapi.testclient import TestClient
from PIL import Image

from ldm_jax import loading, saving
from ldm_jax.adapters import lora, textual_inversion
from ldm_jax.sample.web import api, guard
from ldm_jax.sample.web.catalog import Folders
from ldm_jax.sample.web.limits import Limits
from ldm_jax.sample.web.service import Service

LIMITS = Limits(pixels=64 * 64, images=8, batch=4, queue=4)


def text_run(folder):
    """The run directory of a model of text with the tokenizer of CLIP."""
    saving.save(
        text_model.make(text_model.clip_tokenizer(folder / "clip")), folder / "words", to="ldm_jax"
    )
    return folder / "words"


def adapters(run, folder):
    """LoRAs `sky` and `other`, of another base, embeddings `cat` and `wide`, that fits no model."""
    model, rng = loading.load(run), np.random.default_rng(0)
    (folder / "loras").mkdir()
    made = lora.init(model.params, 2, key=jax.random.key(0))
    made = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), made)
    lora.write(folder / "loras" / "sky.safetensors", made, "peft")
    wide = jax.tree.map(lambda x: np.repeat(x, 3, axis=0)[: x.shape[0] * 3 // 2], made)
    lora.write(folder / "loras" / "other.safetensors", wide, "peft")
    (folder / "embeddings").mkdir()
    for name, width in (("cat", 32), ("wide", 48)):
        vectors = np.float32(rng.normal(size=(2, width)))
        word = textual_inversion.Embedding(f"<{name}>", vectors)
        textual_inversion.write(folder / "embeddings" / f"{name}.pt", word, "webui")


def service(*runs, **folders):
    """A service of runs."""
    return Service([str(run) for run in runs], Folders(**folders), LIMITS)


class Client:
    """Calls of `/sdapi/v1/`."""

    def __init__(self, made):
        self.service = made
        app = guard.Guard(api.make(made), auth=None, most=2**20)
        self.http = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)

    def get(self, name, **given):
        answer = self.http.get(f"/sdapi/v1/{name}", params=given)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, name, given=None, status=200):
        answer = self.http.post(f"/sdapi/v1/{name}", json=given)
        assert answer.status_code == status, answer.text
        return answer.json()

    def refused(self, name, given, status=422):
        """The sentence of a refusal."""
        told = self.post(name, given, status)
        assert {"error", "detail", "body", "errors"} == told.keys()
        return told["errors"]

    def drawn(self, name="txt2img", **given):
        """(pictures, info) of a request of two steps."""
        told = self.post(name, {"steps": 2, "sampler_name": "DDIM", "seed": 5, **given})
        return [opened(text) for text in told["images"]], json.loads(told["info"])


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def encoded(array):
    """Base64 of a PNG of uint8 [H, W] or [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(array)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def noise(seed=0, size=16):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3))
