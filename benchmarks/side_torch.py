"""The side of torch in `paired.py`: diffusers' modules, eager or through `torch.compile`.

LPIPS, discriminator and losses of the first stage are those that the tests compare with.
"""

import contextlib
import itertools
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import cases
import diffusers
import numpy as np
import peft
import sides
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
import torch_first_stage as again

from ldm_jax import schema

# Self time of ATen operators by kind; those that match none are elementwise.
KINDS = {
    cases.OUTSIDE: r"adamw|Optimizer",
    "convolution": r"conv",
    "attention": r"scaled_dot_product|softmax|bmm",
    "norms": r"group_norm|layer_norm",
    "dense": r"addmm|::mm$|linear|matmul",
    "copies": r"copy_|::cat$|clone|contiguous|::to$|fill_|zero_|empty|zeros|slice|view|"
    r"transpose|permute|reshape|::t$|chunk|split|narrow|expand|as_strided|detach|unsafe",
}
KL_WEIGHT, DISC_WEIGHT = 1e-6, 0.5  # as in first_stages:kl-f8


def start(job: sides.Job) -> tuple[str, torch.dtype, Callable[[], None]]:
    """(device, type, a function that waits for the device)."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    device = {"cpu": "cpu", "gpu": "cuda"}[job.platform]
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    return device, getattr(torch, job.dtype), wait


def split(run: Callable, job: sides.Job) -> dict[str, float]:
    """Seconds by kind of operation of one run, from the operators' own time."""
    activities, cuda = [ProfilerActivity.CPU], job.platform == "gpu"
    activities += [ProfilerActivity.CUDA] if cuda else []
    with warnings.catch_warnings(), profile(activities=activities) as profiler:
        warnings.simplefilter("ignore")
        run()
    seconds = dict.fromkeys(cases.KINDS, 0.0)
    for event in profiler.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        seconds[kind_of(event.key)] += own / 1e6
    return seconds


def kind_of(operator: str) -> str:
    """The kind of an ATen operator, or of a kernel that `torch.compile` made and named."""
    if re.search(r"cpp_fused|triton", operator):
        return "norms" if "norm" in operator else "elementwise"
    kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, operator))
    return next(kinds, "elementwise")


# --- the UNet ------------------------------------------------------------------------------------


def plain_unet(model_channels: int) -> diffusers.UNet2DConditionModel:
    """Stable Diffusion v1 at some width; 320 is its own."""
    return diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=tuple(model_channels * m for m in (1, 2, 4, 4)),
        layers_per_block=2,
        cross_attention_dim=cases.CONTEXT[1],
        attention_head_dim=8,  # which is the number of heads there
    )


def load_unet(job: sides.Job, dtype: torch.dtype) -> diffusers.UNet2DConditionModel:
    """The UNet of the folder that both sides read."""
    return diffusers.UNet2DConditionModel.from_pretrained(
        sides.weights(job) / "unet", torch_dtype=dtype, low_cpu_mem_usage=False
    )


def time_unet(job: sides.Job, case: cases.UNet) -> tuple[dict, np.ndarray]:
    """Figures of a forward pass or a training step, and its output or losses."""
    device, dtype, wait = start(job)
    layout = torch.channels_last if job.variant == "channels_last" else torch.contiguous_format
    # parameters stay float32 in training, as on our side
    unet = load_unet(job, torch.float32 if case.train else dtype).to(device, memory_format=layout)
    sides.forget_peak()  # of loading
    given = {k: torch.from_numpy(x).to(device) for k, x in case.inputs().items()}
    x, target = (
        given[k].permute(0, 3, 1, 2).contiguous(memory_format=layout) for k in ("x", "target")
    )
    t, context = given["t"], given["context"]
    autocast = contextlib.nullcontext()
    if case.train:
        unet.train()
        if case.rank is not None:
            add_lora(unet, case.rank)
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, cases.LEARNING_RATE, fused=True)
        if dtype != torch.float32:
            autocast = torch.autocast(device, dtype)
    else:
        unet, x, context = unet.eval(), x.to(dtype), context.to(dtype)

    @torch.inference_mode()
    def forward():
        out = unet(x, t, context).sample
        wait()
        return out

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            out = unet(x, t, context).sample
        loss = torch.nn.functional.mse_loss(out.float(), target)
        loss.backward()
        optimizer.step()
        wait()
        return float(loss.detach())

    run = step if case.train else forward
    figures, values = sides.measure(run, job.seconds)
    if job.split:
        figures["split"] = split(run, job)
    return {"parts": {"run": figures}}, np.array(values) if case.train else nhwc(values[0])


def add_lora(unet: diffusers.UNet2DConditionModel, rank: int) -> None:
    """PEFT's updates of the attentions beside frozen weights, as in the scripts of diffusers."""
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    for name, parameter in unet.named_parameters():
        if name.endswith(".lora_A.default.weight"):
            module = name.removesuffix(".lora_A.default.weight")
            parameter.data = torch.from_numpy(cases.draw(module, tuple(parameter.shape), 1 / rank))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.float().permute(0, 2, 3, 1).cpu().numpy()


# --- sampling ------------------------------------------------------------------------------------


def write_pipeline(job: sides.Job, case: cases.UNet | cases.Sampling) -> None:
    """Stable Diffusion v1's UNet and first stage at the case's width, as torch initializes them."""
    start(job)
    plain_unet(case.model_channels).save_pretrained(sides.weights(job) / "unet")
    stage = cases.KL(channels=cases.DECODER_CHANNELS[case.model_channels])
    first_stage(stage).save_pretrained(sides.weights(job) / "vae")


def time_sampling(job: sides.Job, case: cases.Sampling) -> tuple[dict, np.ndarray]:
    """Figures of the steps and of the decoder, and the image."""
    device, dtype, wait = start(job)
    predict, draw = networks(job, device, dtype)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(case.steps, device=device)
    given = {k: torch.from_numpy(x).to(device, dtype) for k, x in case.inputs().items()}
    x_T, context = given["x_T"].permute(0, 3, 1, 2).contiguous(), given["context"]
    if case.guided:
        context = torch.cat([given["null"], context])

    @torch.inference_mode()
    def steps():
        x = x_T
        for t in scheduler.timesteps:
            out = predict(torch.cat([x, x]) if case.guided else x, t, context).sample
            if case.guided:
                null, cond = out.chunk(2)
                out = null + cases.GUIDANCE * (cond - null)
            x = scheduler.step(out, t, x).prev_sample
        wait()
        return x / cases.SCALE

    @torch.inference_mode()
    def decode(z):
        image = draw(z).sample
        wait()
        return image

    figures, latent, image = sides.measure_sampling(job, steps, decode)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        decode(steps())
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    for part, run in (("steps", steps), ("decode", lambda: decode(latent))):
        part = figures["parts"][part]
        if job.variant == "compile":
            part["compile"] = part["first"] - part["median"]
        if job.split:
            part["split"] = split(run, job)
    return figures, nhwc(image)


def networks(job: sides.Job, device: str, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """(UNet, decoder) as they are, or as diffusers' manual compiles them."""
    unet = load_unet(job, dtype).to(device)
    vae = diffusers.AutoencoderKL.from_pretrained(
        sides.weights(job) / "vae", torch_dtype=dtype, low_cpu_mem_usage=False
    ).to(device)
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


@torch.inference_mode()
def time_operations(job: sides.Job, case: cases.Operations) -> tuple[dict, None]:
    """Figures of scaled-dot-product attention at the shapes of the cases, and of a product."""
    device, dtype, wait = start(job)

    def put(x):
        x = torch.from_numpy(x).to(device, dtype)
        return x.transpose(1, 2) if x.ndim == 4 else x  # heads before tokens

    def attend(times, out, *kv):
        for _ in range(times):
            out = torch.nn.functional.scaled_dot_product_attention(out, *kv)
        wait()

    def product(a, b):
        a @ b
        wait()

    return sides.measure_operations(job, case, put, attend, product), None


# --- first stages --------------------------------------------------------------------------------


def first_stage(config: schema.AutoencoderKLConfig) -> diffusers.AutoencoderKL:
    """The first stage that the config describes, with random weights."""
    levels = len(config.channel_mult)
    return diffusers.AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels * m for m in config.channel_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
    )


def load(module: torch.nn.Module, path: Path) -> torch.nn.Module:
    """The module with the tensors of a file."""
    with np.load(path) as file:
        module.load_state_dict({name: torch.tensor(file[name]) for name in file.files})
    return module


class Trained:
    """Networks and their optimizers."""

    def __init__(self, folder: Path, case: cases.TrainStep):
        self.net = load(first_stage(case.config), folder / "autoencoder.npz").train()
        self.lpips = load(again.LPIPS(), folder / "lpips.npz").requires_grad_(False).eval()
        disc = again.patch_gan(case.config.in_channels, 64, 3, "batch")
        self.disc = load(disc, folder / "discriminator.npz").train()
        with np.load(folder / "noise.npz") as file:
            self.noise = {name: again.nchw(file[name]) for name in file.files}
        self.x, self.steps = again.nchw(case.images()), itertools.count()
        how = {"lr": cases.LEARNING_RATE, "betas": (0.5, 0.9), "fused": True}
        self.tx = torch.optim.Adam(self.net.parameters(), **how, eps=cases.EPSILON)
        self.disc_tx = torch.optim.Adam(self.disc.parameters(), **how, eps=cases.DISC_EPSILON)

    def reconstruct(self, noise):
        """(images, weighted KL)"""
        mean, logvar = moments(self.net, self.x)
        z = mean + torch.exp(0.5 * logvar) * noise
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return self.net.decoder(self.net.post_quant_conv(z)), KL_WEIGHT * kl

    def step(self) -> list[float]:
        """Update both, as the reference's two optimizers do: frozen parts need no gradients."""
        i = next(self.steps) % cases.COMPARED
        noise = [self.noise[f"{i}/{draw}"] for draw in ("encode", "disc_encode")]
        self.disc.requires_grad_(False)
        images, regularization = self.reconstruct(noise[0])
        error = (self.x - images).abs() + self.lpips(self.x, images)
        nll, generator = error.sum() / len(self.x), -self.disc(images).mean()
        last = self.net.decoder.conv_out.weight
        d_weight = again.adaptive_weight(nll, generator, last, DISC_WEIGHT)
        loss = nll + regularization + d_weight * generator
        self.tx.zero_grad(set_to_none=True)
        loss.backward()
        self.tx.step()

        self.disc.requires_grad_(True)
        with torch.no_grad():
            images, _ = self.reconstruct(noise[1])
        d_loss = again.hinge(self.disc(self.x), self.disc(images))
        self.disc_tx.zero_grad(set_to_none=True)
        d_loss.backward()
        self.disc_tx.step()
        return [x.item() for x in (loss, nll, generator, d_weight, d_loss)]

    def time_pieces(self) -> dict[str, dict]:
        """Figures of each piece, forward and backward."""
        other = self.x.flip(2).requires_grad_()

        def whole():
            images, regularization = self.reconstruct(self.noise["0/encode"])
            ((self.x - images).abs().mean() + regularization).backward()

        def perceived():
            self.lpips(self.x, other).mean().backward()

        def judged():
            again.hinge(self.disc(self.x), self.disc(other.detach())).backward()

        figures = {}
        for name, function in zip(cases.PIECES, (whole, perceived, judged), strict=True):
            self.net.zero_grad()
            figures[name], _ = sides.measure(function, 0.0)
        return figures


def moments(net: diffusers.AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of the posterior."""
    mean, logvar = net.quant_conv(net.encoder(x)).chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


def time_step(job: sides.Job, case: cases.TrainStep) -> tuple[dict, np.ndarray]:
    """Figures of the step, and the losses of the first ones."""
    start(job)
    trained = Trained(sides.weights(job), case)
    figures, values = sides.measure(trained.step, job.seconds, cases.COMPARED - 1)
    parts = {"run": figures} | (trained.time_pieces() if job.split else {})
    return {"parts": parts}, cases.compared_losses(values)


def time_encoding(job: sides.Job, case: cases.Encode) -> tuple[dict, np.ndarray]:
    """Figures of the encoder, from images to moments."""
    start(job)
    net = load(first_stage(case.config), sides.weights(job) / "autoencoder.npz").eval()
    x = again.nchw(case.images())
    run = torch.inference_mode()(lambda: moments(net, x))
    figures, values = sides.measure(run, job.seconds, cases.COMPARED - 1)
    return {"parts": {"run": figures}}, np.array([x.abs().mean().item() for x in values[0]])


TIMES = {
    cases.UNet: time_unet,
    cases.Sampling: time_sampling,
    cases.Operations: time_operations,
    cases.TrainStep: time_step,
    cases.Encode: time_encoding,
}

if __name__ == "__main__":
    sides.serve(TIMES, {cases.UNet: write_pipeline, cases.Sampling: write_pipeline})
