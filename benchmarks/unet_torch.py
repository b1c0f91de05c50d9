"""The side of diffusers on torch in `unet_vs_diffusers.py`, which starts it."""

import contextlib
import re
import warnings

import diffusers
import numpy as np
import sides
import torch
import unet_cases
from torch.profiler import ProfilerActivity, profile

# Self time of ATen operators by kind; those that match none are elementwise.
KINDS = {
    "AdamW": r"adamw|Optimizer",
    "convolution": r"conv",
    "attention": r"scaled_dot_product|softmax|bmm",
    "norms": r"group_norm|layer_norm",
    "dense": r"addmm|::mm$|linear|matmul",
    "copies": r"copy_|::cat$|clone|contiguous|::to$|fill_|zero_|empty|zeros|slice|view|"
    r"transpose|permute|reshape|::t$|chunk|split|narrow|expand|as_strided|detach|unsafe",
}


def plain(model_channels: int) -> diffusers.UNet2DConditionModel:
    """Stable Diffusion v1 at some width; 320 is its own."""
    return diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=tuple(model_channels * m for m in (1, 2, 4, 4)),
        layers_per_block=2,
        cross_attention_dim=unet_cases.CONTEXT[1],
        attention_head_dim=8,  # which is the number of heads there
    )


def model(case: unet_cases.Case) -> diffusers.UNet2DConditionModel:
    """That of the case, with the parameters that both sides use."""
    with torch.device("meta"):
        unet = plain(case.model_channels)
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for name, x in unet.named_parameters():
            order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[x.ndim]
            ours = unet_cases.parameter(name, tuple(x.shape[i] for i in order))
            x.copy_(torch.from_numpy(ours.transpose(np.argsort(order))))
    return unet


def run_case(job: unet_cases.Job, case: unet_cases.Case) -> tuple[dict, np.ndarray | None]:
    """Figures of one case, and the output of a forward pass."""
    torch.set_num_threads(job.threads)
    device = {"cpu": "cpu", "gpu": "cuda"}[job.platform]
    dtype = getattr(torch, job.dtype)
    layout = torch.channels_last if job.variant == "channels_last" else torch.contiguous_format
    low = contextlib.nullcontext()
    unet = model(case).to(device, memory_format=layout)
    if dtype != torch.float32 and case.train:
        low = torch.autocast(device, dtype)  # parameters stay float32, as on our side
    elif dtype != torch.float32:
        unet = unet.to(dtype)
    given = {k: torch.from_numpy(x).to(device) for k, x in unet_cases.inputs(case).items()}
    x, target = (
        given[k].permute(0, 3, 1, 2).contiguous(memory_format=layout) for k in ("x", "target")
    )
    t, context = given["t"], given["context"]
    if not case.train:
        x, context = x.to(dtype), context.to(dtype)
        unet.eval()
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    @torch.inference_mode()
    def forward():
        out = unet(x, t, context).sample
        synchronize()
        return out

    def step():
        optimizer.zero_grad(set_to_none=True)
        with low:
            out = unet(x, t, context).sample
        loss = torch.nn.functional.mse_loss(out.float(), target)
        loss.backward()
        optimizer.step()
        synchronize()
        return float(loss.detach())

    if case.train:
        unet.train()
        optimizer = torch.optim.AdamW(unet.parameters(), unet_cases.LEARNING_RATE, fused=True)
    run = step if case.train else forward
    figures, values = sides.measure(run, job.seconds)
    if job.split:
        figures["split"] = split(run, device)
    if case.train:
        return figures | {"losses": values[: sides.LEAST_RUNS]}, None
    return figures, values[0].float().permute(0, 2, 3, 1).cpu().numpy()


def split(run, device: str) -> dict[str, float]:
    """Seconds by kind of operation of one run, from the operators' own time."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with warnings.catch_warnings(), profile(activities=activities) as profiler:
        warnings.simplefilter("ignore")
        run()
    seconds = dict.fromkeys(unet_cases.KINDS, 0.0)
    for event in profiler.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        seconds[kind_of(event.key)] += own / 1e6
    return seconds


def kind_of(operator: str) -> str:
    """The kind of an ATen operator, or of a kernel that `torch.compile` made and named."""
    if re.search(r"cpp_fused|triton", operator):
        return "norms" if "norm" in operator else "elementwise"
    for kind, pattern in KINDS.items():
        if re.search(pattern, operator):
            return kind
    return "elementwise"


if __name__ == "__main__":
    unet_cases.serve(run_case)
