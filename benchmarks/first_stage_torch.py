"""The side of torch in `first_stage.py`, which starts it: eager, diffusers' first stage, Adam.

LPIPS, discriminator and losses are those that the tests compare with.
"""

import itertools
import sys
from pathlib import Path

import diffusers
import first_stage_cases as cases
import numpy as np
import sides
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
import torch_first_stage as again

KL_WEIGHT, DISC_WEIGHT = 1e-6, 0.5  # as in first_stages:kl-f8


def run_case(job: cases.Job, case: cases.Case) -> dict:
    """Times one case; see `first_stage_cases.serve`."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    return step(job, case) if case.kind == "step" else encoding(job, case)


def autoencoder(case: cases.Case) -> diffusers.AutoencoderKL:
    """The first stage of a case."""
    model = cases.MODELS[case.model]
    levels = len(model.channel_mult)
    return diffusers.AutoencoderKL(
        in_channels=model.image_channels,
        out_channels=model.image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(model.channels * m for m in model.channel_mult),
        layers_per_block=model.num_res_blocks,
        latent_channels=model.z_channels,
    )


def load(module: torch.nn.Module, path: Path) -> torch.nn.Module:
    """The module with the tensors of a file."""
    with np.load(path) as file:
        module.load_state_dict({name: torch.tensor(file[name]) for name in file.files})
    return module


class Trained:
    """Networks and their optimizers."""

    def __init__(self, job: cases.Job, case: cases.Case):
        folder = cases.weights_of(job)
        self.net = load(autoencoder(case), folder / "autoencoder.npz").train()
        self.lpips = load(again.LPIPS(), folder / "lpips.npz").requires_grad_(False).eval()
        channels = cases.MODELS[case.model].image_channels
        disc = again.patch_gan(channels, 64, 3, "batch")
        self.disc = load(disc, folder / "discriminator.npz").train()
        with np.load(folder / "noise.npz") as file:
            self.noise = {name: again.nchw(file[name]) for name in file.files}
        self.x, self.steps = again.nchw(cases.images(case)), itertools.count()
        how = {"lr": cases.LEARNING_RATE, "betas": (0.5, 0.9), "fused": True}
        self.tx = torch.optim.Adam(self.net.parameters(), **how, eps=cases.EPSILON)
        self.disc_tx = torch.optim.Adam(self.disc.parameters(), **how, eps=cases.DISC_EPSILON)

    def reconstruct(self, noise):
        """(images, weighted KL)"""
        moments = self.net.quant_conv(self.net.encoder(self.x))
        mean, logvar = moments.chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        z = mean + torch.exp(0.5 * logvar) * noise
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return self.net.decoder(self.net.post_quant_conv(z)), KL_WEIGHT * kl

    def step(self) -> list[float]:
        """As the reference's two optimizers: what does not learn needs no gradients."""
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

    def pieces(self) -> dict[str, float]:
        """Seconds of each part, forward and backward."""
        other = self.x.flip(2).requires_grad_()

        def whole():
            images, regularization = self.reconstruct(self.noise["0/encode"])
            ((self.x - images).abs().mean() + regularization).backward()

        def perceived():
            self.lpips(self.x, other).mean().backward()

        def judged():
            again.hinge(self.disc(self.x), self.disc(other.detach())).backward()

        found = {}
        for name, function in zip(cases.PIECES, (whole, perceived, judged), strict=True):
            self.net.zero_grad()
            found[name] = cases.median_of(function)
        return found


def step(job: cases.Job, case: cases.Case) -> dict:
    """Figures of the step, and the losses of the first ones."""
    trained = Trained(job, case)
    figures, values = sides.measure(trained.step, job.seconds, cases.COMPARED - 1)
    figures["losses"] = cases.of_steps(values)
    if job.pieces:
        figures["pieces"] = trained.pieces()
    return figures


def encoding(job: cases.Job, case: cases.Case) -> dict:
    """Figures of the encoder, from images to moments."""
    net = load(autoencoder(case), cases.weights_of(job) / "autoencoder.npz").eval()
    x = again.nchw(cases.images(case))

    @torch.inference_mode()
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = net.quant_conv(net.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    figures, values = sides.measure(run, job.seconds, cases.COMPARED - 1)
    return figures | {"losses": [[x.abs().mean().item() for x in values[0]]]}


if __name__ == "__main__":
    cases.serve(run_case)
