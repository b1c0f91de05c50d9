"""Networks and losses of the reference's first stages, stated again in torch, NCHW.

Only tests marked `torch` import this.
"""

import torch
from torch import nn
from torch.nn import functional as F


def nchw(x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


class ActNorm(nn.Module):
    """Takes loc and scale from its first batch in training, then learns them."""

    def __init__(self, channels):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x):
        if self.training and not self.initialized:
            with torch.no_grad():
                values = x.transpose(0, 1).flatten(1)
                self.loc.copy_(-values.mean(1)[None, :, None, None])
                self.scale.copy_((1 / (values.std(1) + 1e-6))[None, :, None, None])
                self.initialized.fill_(1)
        return self.scale * (x + self.loc)


def patch_gan(channels, width, layers, norm):
    """The discriminator's `main`."""
    make_norm, bias = (nn.BatchNorm2d, False) if norm == "batch" else (ActNorm, True)
    found = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    before = width
    for i in range(1, layers + 1):
        now = width * min(2**i, 8)
        stride = 2 if i < layers else 1
        found += [
            nn.Conv2d(before, now, 4, stride, 1, bias=bias),
            make_norm(now),
            nn.LeakyReLU(0.2),
        ]
        before = now
    return nn.Sequential(*found, nn.Conv2d(before, 1, 4, 1, 1))


class LPIPS(nn.Module):
    """In evaluation mode: without the dropout before the last layers. `width` 64 is VGG16."""

    def __init__(self, width=64):
        super().__init__()
        layers, before = [], 3
        widths = [width * mult for mult in (1, 2, 4, 8, 8)]
        for channels, count in zip(widths, (2, 2, 3, 3, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(before, channels, 3, 1, 1), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers[:-1])
        for i, channels in enumerate(widths):
            lin = nn.Module()
            lin.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            setattr(self, f"lin{i}", lin)

    def forward(self, a, b):
        """[B, 1, 1, 1]"""
        shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
        x, y = (a - shift) / scale, (b - shift) / scale
        total, stage = 0, 0
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in (3, 8, 15, 22, 29):
                difference = (self._unit(x) - self._unit(y)) ** 2
                weighted = getattr(self, f"lin{stage}").model(difference)
                total = total + weighted.mean((2, 3), keepdim=True)
                stage += 1
        return total

    @staticmethod
    def _unit(x):
        return x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10)


def adaptive_weight(nll, generator, last, disc_weight):
    of_nll = torch.autograd.grad(nll, last, retain_graph=True)[0]
    of_generator = torch.autograd.grad(generator, last, retain_graph=True)[0]
    return torch.clamp(of_nll.norm() / (of_generator.norm() + 1e-4), 0, 1e4) * disc_weight


def hinge(real, fake):
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def quantized(codebook, z, beta):
    """(codes with the gradient of z, loss of `VectorQuantizer2` with legacy=True), z NCHW."""
    flat = z.permute(0, 2, 3, 1)
    indices = ((flat[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)
    codes = codebook[indices]
    loss = ((codes.detach() - flat) ** 2).mean() + beta * ((codes - flat.detach()) ** 2).mean()
    return (flat + (codes - flat).detach()).permute(0, 3, 1, 2), loss
