"""A page in the browser, and the API of stable-diffusion-webui: `ldm-web --model PATH`."""

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any, Literal

import jax
from tyro.conf import FlagCreatePairsOff, arg

from ldm_jax.runtime import cli, flags
from ldm_jax.runtime.log import LOG

INSTALL = "pip install 'ldm_jax[web]'"


@dataclasses.dataclass(frozen=True)
class Options:
    """Show a page, and answer the API of stable-diffusion-webui at /sdapi/v1/ (described at /docs).

    There is no filter of what is drawn: who lets others in answers for what they draw.
    """

    model: Annotated[tuple[str, ...], arg(metavar="PATH ...", help_behavior_hint="")] = ()
    """Models as `ldm-sample --model` takes them; the first one is loaded at the start."""
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address of this machine to listen at; another than its own needs --listen."""
    port: int = 7860
    """Port; 0 takes a free one, and says which."""
    listen: FlagCreatePairsOff[bool] = False
    """Let other machines in, at 0.0.0.0 unless --host says otherwise; needs --api-auth."""
    api_auth: Annotated[str | None, arg(metavar="USER:PASSWORD")] = None
    """Ask for these (HTTP Basic), at the page too. Without TLS they can be read on the way: put a
    proxy with TLS before it. The variable LDM_WEB_AUTH hides them from lists of processes."""
    api_only: FlagCreatePairsOff[bool] = False
    """Leave out the page."""
    out: flags.OptionalDir = None
    """Folder for pictures that requests ask to be kept; without it none are."""
    lora_dir: flags.OptionalDir = None
    """Folder of the files that <lora:NAME> in a prompt names."""
    embedding_dir: flags.OptionalDir = None
    """Folder of embeddings, which prompts name by their files' names."""
    styles: flags.OptionalFile = None
    """Styles: .csv with name, prompt and negative_prompt."""
    preview_decoder: flags.OptionalFile = None
    """Decoder of TAESD for previews: taesd_decoder.safetensors, or a folder of diffusers; default:
    the model's own, which takes longer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type."""
    queue: int = 64
    """Most requests that wait."""
    max_pixels: int = 2048 * 2048
    """Most pixels of a picture."""


def serve(argv: Sequence[str]) -> int:
    """Run the server until it is told to stop."""
    options, process = flags.parse(argv, "ldm-web", Options.__doc__, Options, flags.Process)
    options = checked(options)
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f"ldm-web needs {error.name}: {INSTALL}") from error
    cli.start(process)
    app, service = application(options)
    config = uvicorn.Config(app, host=options.host, port=options.port, log_level="warning")
    server = stoppable(uvicorn.Server, service)(config)
    service.load(service.current)
    server.run()
    service.queue.close()
    service.queue.join()
    return 0


def stoppable(base: type, service: Any) -> type:
    """A uvicorn server that says where it is, and that ends after the running batch."""

    class Server(base):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for server in self.servers:
                for socket in server.sockets:
                    host, port = socket.getsockname()[:2]
                    host = f"[{host}]" if ":" in host else host
                    LOG.info(f"http://{host}:{port}/ (API: /docs); Ctrl-C ends it")

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit and sig == signal.SIGINT:
                self.force_exit = True
                return
            self.should_exit = True
            service.queue.close()
            LOG.info("ends after the running batch; Ctrl-C again ends it now")

            def ended() -> None:
                service.queue.join()
                time.sleep(1)  # answers go out; streams of pages that are open have no end
                self.force_exit = True

            threading.Thread(target=ended, daemon=True).start()

    return Server


def checked(options: Options) -> Options:
    """Options with those of the environment. ValueError for some that are not safe."""
    if not options.model:
        raise ValueError("give --model PATH")
    auth = options.api_auth or os.environ.get("LDM_WEB_AUTH")
    if auth is not None and (":" not in auth or auth.startswith(":") or auth.endswith(":")):
        raise ValueError("--api-auth: give USER:PASSWORD")
    if options.listen:
        if auth is None:
            raise ValueError("--listen lets other machines in: give --api-auth USER:PASSWORD too")
        host = "0.0.0.0" if options.host == "127.0.0.1" else options.host
        options = dataclasses.replace(options, host=host)
    elif options.host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"--host {options.host}: other machines can reach it: give --listen too")
    for name, least in (("port", 0), ("queue", 1), ("max_pixels", 64)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(options, name)}: give at least {least}")
    return dataclasses.replace(options, api_auth=auth)


def application(options: Options) -> tuple[Any, Any]:
    """(ASGI application, its service)."""
    from ldm_jax.sample.web import api, guard
    from ldm_jax.sample.web.catalog import Folders
    from ldm_jax.sample.web.limits import Limits
    from ldm_jax.sample.web.service import Service

    if jax.process_count() > 1:
        raise ValueError("ldm-web runs in one process")
    limits = Limits(queue=options.queue, pixels=options.max_pixels)
    folders = Folders(options.out, options.lora_dir, options.embedding_dir, options.styles)
    service = Service(
        options.model,
        folders,
        limits,
        dtype=options.dtype,
        private=options.listen,
        decoder=options.preview_decoder,
    )
    app: Any = api.make(service)
    if not options.api_only:
        from ldm_jax.sample.web import page

        app = page.mounted(app, service)
    return guard.Guard(app, auth=options.api_auth, most=limits.body), service


def main() -> None:
    """Entry point of `ldm-web`."""
    sys.exit(cli.run("ldm-web", serve, sys.argv[1:]))


if __name__ == "__main__":
    main()
