"""The API of stable-diffusion-webui, `/sdapi/v1/`: names, defaults and answers are its own."""

import asyncio
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from typing import Any

import fastapi
import numpy as np
import pydantic
from fastapi import exceptions, responses
from starlette.concurrency import run_in_threadpool

from ldm_jax.prompting import parameters
from ldm_jax.runtime import images
from ldm_jax.sample.web import catalog, describe, names, pictures
from ldm_jax.sample.web.asked import Asked, Extra, ExtraBatch, ExtraSingle, Img2Img, Txt2Img
from ldm_jax.sample.web.jobs import CancelledError, Job
from ldm_jax.sample.web.limits import RefusedError
from ldm_jax.sample.web.service import Result, Service
from ldm_jax.sample.web.translate import UPSCALERS

EMPTY: dict[str, Any] = {
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "sd-vae": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "extensions": [],
}
"""{name: answer} of what clients ask for at their start, and of which there is nothing here."""


class PngInfo(pydantic.BaseModel):
    """A picture whose text is asked for."""

    image: str = ""


def make(service: Service) -> fastapi.FastAPI:
    """The application of a service."""
    app = fastapi.FastAPI(
        title="ldm-web",
        version=importlib.metadata.version("ldm_jax"),
        docs_url=None,  # its pages come from other hosts
        redoc_url=None,
    )
    _add_errors(app)
    router = fastapi.APIRouter(prefix="/sdapi/v1")
    _add_drawing(router, service)
    _add_settings(router, service)
    _add_lists(router, service)
    _add_running(router, service)
    app.include_router(router)

    @app.get("/docs", include_in_schema=False)
    def docs() -> responses.HTMLResponse:
        return responses.HTMLResponse(describe.page(app.openapi()))

    return app


# --- errors ---------------------------------------------------------------------------------------


def _add_errors(app: fastapi.FastAPI) -> None:
    def answer(status: int, error: Exception, detail: Any) -> responses.JSONResponse:
        body = {
            "error": type(error).__name__,
            "detail": detail,
            "body": "",
            "errors": detail if isinstance(detail, str) else str(error)[:2000],
        }
        return responses.JSONResponse(body, status)

    @app.exception_handler(RefusedError)
    def refused(request: fastapi.Request, error: RefusedError) -> responses.JSONResponse:
        del request
        return answer(error.status, error, str(error))

    @app.exception_handler(exceptions.RequestValidationError)
    def unread(
        request: fastapi.Request, error: exceptions.RequestValidationError
    ) -> responses.JSONResponse:
        del request
        # without the input, which may be a picture, or a number that JSON lacks
        told = [{k: e[k] for k in ("type", "loc", "msg") if k in e} for e in error.errors()]
        return answer(422, error, told)

    @app.exception_handler(Exception)
    def failed(request: fastapi.Request, error: Exception) -> responses.JSONResponse:
        del request
        return answer(500, error, "the server failed; its log says how")


async def _finished(job: Job, request: fastapi.Request) -> Result:
    """The result of a job, which is cancelled when its client goes away."""
    future = asyncio.wrap_future(job.future)
    while not future.done():
        await asyncio.wait({future}, timeout=1.0)
        if not future.done() and await request.is_disconnected():
            job.cancel()
    try:
        return future.result()
    except RefusedError:
        raise
    except ValueError as error:  # of a task: it says what is wrong with the request
        raise RefusedError(422, str(error)) from error
    except CancelledError as error:
        raise RefusedError(503, "the request was cancelled") from error


def _client(request: fastapi.Request) -> str:
    return request.client.host if request.client else ""


# --- pictures -------------------------------------------------------------------------------------


def _add_drawing(router: fastapi.APIRouter, service: Service) -> None:
    async def draw(asked: Asked, request: fastapi.Request) -> responses.Response:
        result = await _finished(service.submit(asked, _client(request)), request)
        return await run_in_threadpool(lambda: responses.JSONResponse(answered(asked, result)))

    @router.post("/txt2img")
    async def txt2img(asked: Txt2Img, request: fastapi.Request) -> responses.Response:
        """Pictures of a text, a class, or nothing in particular."""
        return await draw(asked, request)

    @router.post("/img2img")
    async def img2img(asked: Img2Img, request: fastapi.Request) -> responses.Response:
        """Pictures that begin with a picture, all of it or under a mask."""
        return await draw(asked, request)

    async def enlarge(asked: Extra, request: fastapi.Request) -> Result:
        return await _finished(service.submit(asked, _client(request)), request)

    @router.post("/extra-single-image")
    async def extra_single_image(asked: ExtraSingle, request: fastapi.Request) -> dict[str, Any]:
        """One picture, enlarged."""
        result = await enlarge(asked, request)
        return {"html_info": "", "image": pictures.encoded(result.png(0))}

    @router.post("/extra-batch-images")
    async def extra_batch_images(asked: ExtraBatch, request: fastapi.Request) -> dict[str, Any]:
        """Several pictures, enlarged."""
        result = await enlarge(asked, request)
        drawn = [pictures.encoded(result.png(i)) for i in range(len(result.pictures))]
        return {"html_info": "", "images": drawn}

    @router.post("/png-info")
    async def png_info(asked: PngInfo) -> dict[str, Any]:
        """What the text in a picture says of how it was made."""
        data = pictures.decoded(asked.image, "image", service.limits)
        return await run_in_threadpool(lambda: read_info(data))


def answered(asked: Asked, result: Result) -> dict[str, Any]:
    """The answer to a request for pictures."""
    given = asked.model_dump(mode="json")
    if not getattr(asked, "include_init_images", False):
        given |= dict.fromkeys(asked.PICTURES)
    info = {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(result.seeds),
        "negative_prompt": asked.negative_prompt or "",
        "all_negative_prompts": [asked.negative_prompt or ""] * len(result.seeds),
        "seed": result.seeds[0] if result.seeds else -1,
        "all_seeds": result.seeds,
        "subseed": result.subseeds[0] if result.subseeds else -1,
        "all_subseeds": result.subseeds,
        "batch_size": asked.batch_size,
        "sd_model_name": result.entry.name,
        "sd_model_hash": result.entry.digest[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": asked.seed_resize_from_w,
        "seed_resize_from_h": asked.seed_resize_from_h,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": result.infotexts,
        "styles": asked.styles or [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "is_using_inpainting_conditioning": result.entry.kind == "inpaint",
        "restore_faces": False,
        "face_restoration_model": None,
        "version": f"ldm_jax {importlib.metadata.version('ldm_jax')}",
        **result.facts,
    }
    drawn = [pictures.encoded(result.png(i)) for i in range(len(result.pictures))]
    return {
        "images": drawn if asked.send_images else [],
        "parameters": given,
        "info": json.dumps(info),
    }


def read_info(data: bytes) -> dict[str, Any]:
    """`info`, `items` and `parameters` of a picture. RefusedError for broken text."""
    try:
        info = images.info_of(data)
        known = parameters.of_info(info, "image")
    except ValueError as error:
        raise RefusedError(422, str(error)) from error
    if known is None:
        told, given = "", {}
    else:
        told = info.get("parameters", known.prompt)
        given = {"Prompt": known.prompt, "Negative prompt": known.negative_prompt, **known.fields}
    items = {str(k): v for k, v in info.items() if isinstance(v, str)}
    return {"info": told, "items": items, "parameters": given}


# --- settings and lists ---------------------------------------------------------------------------


def _add_settings(router: fastapi.APIRouter, service: Service) -> None:
    @router.get("/options")
    def get_options() -> dict[str, Any]:
        """The settings."""
        return service.settings.now() | {"sd_checkpoint_hash": service.current.digest}

    @router.post("/options")
    def set_options(given: dict[str, Any]) -> None:
        """Change some settings for all later requests."""
        wanted = given.get("sd_model_checkpoint")
        if isinstance(wanted, str) and wanted:
            title = catalog.named(service.entries, wanted).title
            given = {**given, "sd_model_checkpoint": title}
        service.settings.change(given)

    @router.get("/cmd-flags")
    def cmd_flags() -> dict[str, Any]:
        """Options of the command."""
        return {"api": True, "ckpt": service.entries[0].name}


def _add_lists(router: fastapi.APIRouter, service: Service) -> None:
    @router.get("/sd-models")
    def sd_models() -> list[dict[str, Any]]:
        """The models."""
        return [
            {
                "title": entry.title,
                "model_name": entry.name,
                "hash": entry.digest[:10],
                "sha256": entry.digest,
                "filename": entry.name if service.private else entry.path,
                "config": None,
            }
            for entry in service.entries
        ]

    @router.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        """The samplers."""
        return [
            {"name": name, "aliases": list(names.ALIASES[solver]), "options": {}}
            for name, solver in names.samplers().items()
        ]

    @router.get("/schedulers")
    def schedulers() -> list[dict[str, Any]]:
        """The schedules."""
        rho = {"karras": 7.0}
        return [
            {
                "name": name,
                "label": label,
                "aliases": None,
                "default_rho": rho.get(name, -1.0),
                "need_inner_model": name == "sgm_uniform",
            }
            for name, (label, _) in names.SCHEDULES.items()
        ]

    @router.get("/upscalers")
    def upscalers() -> list[dict[str, Any]]:
        """What enlarges pictures."""
        return [
            {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
            for name in service.upscalers()
        ]

    @router.get("/latent-upscale-modes")
    def latent_upscale_modes() -> list[dict[str, str]]:
        """What enlarges latents."""
        return [{"name": name} for name in UPSCALERS if name.startswith("Latent")]

    def shown(file: catalog.File) -> str:
        return os.path.basename(file.path) if service.private else file.path

    @router.get("/loras")
    def loras() -> list[dict[str, Any]]:
        """LoRAs that prompts may name."""
        return [
            {"name": file.name, "alias": file.name, "path": shown(file), "metadata": {}}
            for file in service.loras()
        ]

    @router.get("/embeddings")
    def embeddings() -> dict[str, Any]:
        """Words that prompts may hold."""
        told: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
        for name, one in service.embeddings().items():
            facts: dict[str, Any] = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name"))
            if not isinstance(one, str):
                facts |= {"shape": one.vectors.shape[1], "vectors": one.vectors.shape[0]}
            told["skipped" if isinstance(one, str) else "loaded"][name] = facts
        return told

    @router.get("/prompt-styles")
    def prompt_styles() -> list[dict[str, str]]:
        """Styles."""
        return [
            {"name": name, "prompt": one.prompt, "negative_prompt": one.negative_prompt}
            for name, one in service.styles().items()
        ]

    def nothing(answer: Any) -> Callable[[], Any]:
        return lambda: answer

    for name, answer in EMPTY.items():
        router.get(f"/{name}", name=name)(nothing(answer))
    for name in ("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings"):
        router.post(f"/{name}", name=name)(nothing(None))


# --- what runs ------------------------------------------------------------------------------------


def _add_running(router: fastapi.APIRouter, service: Service) -> None:
    @router.get("/progress")
    def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """How far the running request is."""
        return progress_of(service.queue.running, not skip_current_image)

    def stop(how: str) -> None:
        running = service.queue.running
        if running is not None:
            running.watch.stop = how

    @router.post("/interrupt")
    def interrupt() -> dict[str, Any]:
        """End the running request with its pictures as they are."""
        stop("interrupt")
        return {}

    @router.post("/skip")
    def skip() -> dict[str, Any]:
        """End the running batch with its pictures as they are, and go on with the next."""
        stop("skip")
        return {}

    @router.get("/memory")
    def memory() -> dict[str, Any]:
        """Memory of the process and its devices, in bytes."""
        return {"ram": _ram(), "cuda": _devices()}


def progress_of(job: Job | None, with_picture: bool) -> dict[str, Any]:
    """The answer to `/progress`."""
    watch = None if job is None else job.watch
    state = {
        "skipped": watch is not None and watch.stop == "skip",
        "interrupted": watch is not None and watch.stop == "interrupt",
        "stopping_generation": watch is not None and watch.stop == "last",
        "job": "" if job is None else job.name,
        "job_count": 0 if watch is None else 1,
        "job_timestamp": time.strftime(
            "%Y%m%d%H%M%S", time.localtime(job.submitted if job else time.time())
        ),
        "job_no": 0,
        "sampling_step": 0 if watch is None else watch.step,
        "sampling_steps": 0 if watch is None else watch.steps,
    }
    if watch is None:
        return {
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": state,
            "current_image": None,
            "textinfo": None,
        }
    watch.wants_preview |= with_picture
    image = None
    if with_picture and watch.preview is not None:
        shown = watch.preview
        strip = shown[0] if len(shown) == 1 else images.grid(shown, len(shown))
        image = pictures.encoded(images.png(np.asarray(strip)))
    return {
        "progress": min(0.01 + watch.fraction, 1.0),
        "eta_relative": watch.eta or 0.0,
        "state": state,
        "current_image": image,
        "textinfo": watch.doing,
    }


def _ram() -> dict[str, Any]:
    pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")}
    page = os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[1]) * page
    total = pages["SC_PHYS_PAGES"] * page
    return {"free": pages["SC_AVPHYS_PAGES"] * page, "used": used, "total": total}


def _devices() -> dict[str, Any]:
    import jax

    told = jax.devices()[0].memory_stats()
    if not told:
        return {"error": "unavailable"}
    used, total = told.get("bytes_in_use", 0), told.get("bytes_limit", 0)
    return {"system": {"free": total - used, "used": used, "total": total}}
