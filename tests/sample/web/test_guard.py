"""Who is let in, and with how much."""

import base64

import fastapi
import pytest
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from ldm_jax.sample.web import guard, main

HERE = "http://127.0.0.1:7860"


def client(auth=None, most=1000):
    app = fastapi.FastAPI()

    @app.post("/length")
    async def length(request: fastapi.Request):
        return len(await request.body())

    @app.get("/gradio_api/proxy=http://x")
    def proxy():
        return "fetched"

    @app.websocket("/socket")
    async def socket(websocket: fastapi.WebSocket):
        await websocket.accept()

    return TestClient(guard.Guard(app, auth=auth, most=most), base_url=HERE)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "evil.example"}, 403),  # a name that was made to lead here
        ({"host": "127.0.0.1.evil.example:7860"}, 403),
        ({"origin": HERE}, 200),
        ({"origin": "http://127.0.0.1:8000"}, 403),  # another server of this machine
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-length": "x"}, 400),
    ],
)
def test_host_and_origin(headers, status):
    answer = client().post("/length", headers=headers)
    assert answer.status_code == status
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_the_size_of_a_request():
    assert client().post("/length", content=b"x" * 1000).json() == 1000
    for content in (b"x" * 1001, (b"x" * 100 for _ in range(11))):  # told before, and not
        answer = client().post("/length", content=content)
        assert (answer.status_code, answer.text) == (413, "the request has more than 1,000 bytes")


def test_a_password():
    asking = client(auth="ann:sécret")
    assert asking.post("/length").status_code == 401
    for told, status in (("ann:secret", 401), ("ann:sécret", 200), ("ann", 401)):
        token = base64.b64encode(told.encode()).decode()
        headers = {"authorization": f"Basic {token}", "host": "any.example"}
        assert asking.post("/length", headers=headers).status_code == status
    assert asking.post("/length", headers={"authorization": "Basic !"}).status_code == 401


def test_what_is_closed():
    assert client().get("/gradio_api/proxy=http://x").status_code == 404
    with pytest.raises(WebSocketDisconnect) as closed, client().websocket_connect("/socket"):
        pass
    assert closed.value.code == 1008


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --model PATH"),
        ({"model": ("m",), "listen": True}, "--api-auth USER:PASSWORD"),
        ({"model": ("m",), "host": "0.0.0.0"}, "--listen"),
        ({"model": ("m",), "api_auth": "ann"}, "USER:PASSWORD"),
        ({"model": ("m",), "queue": 0}, "--queue 0"),
    ],
)
def test_options_that_are_not_safe(options, message, monkeypatch):
    monkeypatch.delenv("LDM_WEB_AUTH", raising=False)
    with pytest.raises(ValueError, match=message):
        main.checked(main.Options(**options))


def test_a_password_lets_others_in(monkeypatch):
    monkeypatch.setenv("LDM_WEB_AUTH", "ann:secret")
    checked = main.checked(main.Options(model=("m",), listen=True))
    assert (checked.host, checked.api_auth) == ("0.0.0.0", "ann:secret")
