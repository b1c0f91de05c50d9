"""The side of diffusers on torch in `sampling.py`, which starts it: eager or `torch.compile`.

`python sampling_torch.py FOLDER MODEL_CHANNELS DECODER_CHANNELS` writes the weights of both sides.
"""

import functools
import sys

import diffusers
import numpy as np
import sampling_cases
import sides
import torch
import unet_cases
import unet_torch


def write(folder: str, model_channels: int, decoder_channels: int) -> None:
    """UNet and first stage of Stable Diffusion v1 at these widths, as torch initializes them."""
    torch.manual_seed(0)
    unet_torch.plain(model_channels).save_pretrained(f"{folder}/unet")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(decoder_channels * m for m in (1, 2, 4, 4)),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=sampling_cases.SCALE,
    ).save_pretrained(f"{folder}/vae")


def run_case(job: sampling_cases.Job, case: sampling_cases.Case) -> tuple[dict, np.ndarray]:
    """Times one case; see `sampling_cases.serve`."""
    torch.set_num_threads(job.threads)
    device, dtype = {"cpu": "cpu", "gpu": "cuda"}[job.platform], getattr(torch, job.dtype)
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    how = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    unet = diffusers.UNet2DConditionModel.from_pretrained(f"{job.weights}/unet", **how)
    vae = diffusers.AutoencoderKL.from_pretrained(f"{job.weights}/vae", **how)
    unet, vae = unet.to(device), vae.to(device)
    predict, draw = compiled(job, unet, vae)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(case.steps, device=device)
    given = {
        k: torch.from_numpy(x).to(device, dtype) for k, x in sampling_cases.inputs(case).items()
    }
    x_T = given["x_T"].permute(0, 3, 1, 2).contiguous()
    context = given["context"]
    if case.guided:
        context = torch.cat([given["null"], context])

    @torch.inference_mode()
    def steps():
        x = x_T
        for t in scheduler.timesteps:
            out = predict(torch.cat([x, x]) if case.guided else x, t, context).sample
            if case.guided:
                null, cond = out.chunk(2)
                out = null + sampling_cases.GUIDANCE * (cond - null)
            x = scheduler.step(out, t, x).prev_sample
        synchronize()
        return x / sampling_cases.SCALE

    @torch.inference_mode()
    def decode(z):
        image = draw(z).sample
        synchronize()
        return image

    figures, image = sampling_cases.parts(job, case, steps, decode)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        decode(steps())
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if job.variant == "compile":
        for part in ("steps", "decode"):
            runs = figures[part]
            runs["compile"] = runs["first"] - float(np.median(runs["runs"]))
    if job.split:
        latent = steps()
        for part, run in (("steps", steps), ("decode", lambda: decode(latent))):
            seconds = unet_torch.split(run, device)
            figures[part]["split"] = {k: seconds.get(k, 0.0) for k in sampling_cases.KINDS}
    return figures, image.float().permute(0, 2, 3, 1).cpu().numpy()


def compiled(job: sampling_cases.Job, unet, vae):
    """The two functions that are timed: as they are, or as diffusers' manual compiles them."""
    if job.variant != "compile":
        return unet, vae.decode
    if job.platform == "cpu":
        # only names the kernels in the profile
        torch._inductor.config.cpp.enable_kernel_profile = True
        return torch.compile(unet), torch.compile(vae.decode)
    unet.to(memory_format=torch.channels_last)
    vae.to(memory_format=torch.channels_last)
    how = {"mode": "max-autotune", "fullgraph": True}
    return torch.compile(unet, **how), torch.compile(vae.decode, **how)


def run_operations(job: sampling_cases.Job) -> dict:
    """As `sampling_jax.run_operations`, with scaled-dot-product attention."""
    torch.set_num_threads(job.threads)
    device, dtype = {"cpu": "cpu", "gpu": "cuda"}[job.platform], getattr(torch, job.dtype)
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def on_device(name, shape):
        return torch.from_numpy(unet_cases.draw(name, shape)).to(device, dtype)

    @torch.inference_mode()
    def attend(qkv, times):
        out, *kv = qkv
        for _ in range(times):
            out = torch.nn.functional.scaled_dot_product_attention(out, *kv)
        synchronize()
        return out

    @torch.inference_mode()
    def product():
        out = a @ a
        synchronize()
        return out

    found = {}
    for case in job.attention_of:
        for where, shape in sampling_cases.attention_shapes(case).items():
            batch, queries, keys, heads, width = shape
            qkv = [
                on_device(name, (batch, tokens, heads, width)).transpose(1, 2)
                for name, tokens in (("q", queries), ("k", keys), ("v", keys))
            ]
            found[where] = {
                name: sides.measure(functools.partial(attend, qkv, times), job.seconds / 4)[0]
                for name, times in (("one", 1), ("row", sampling_cases.IN_A_ROW))
            }
    side = sampling_cases.matrix_side(job.platform)
    a = on_device("a", (side, side))
    figures, _ = sides.measure(product, job.seconds)
    return {"attention": found, "product": figures | {"flops": 2.0 * side**3}}


if __name__ == "__main__":
    if len(sys.argv) == 4:
        write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        sampling_cases.serve(run_case, run_operations)
