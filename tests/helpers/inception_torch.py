"""The FID Inception in PyTorch, written down once more from the released graph, as a function."""

import torch
import torch.nn.functional as F


def prepare(pixels, how):
    """uint8 [B, 3, H, W] as torch-fidelity or pytorch-fid hand it to the network."""
    x = torch.as_tensor(pixels).float()
    if how == "torch_fidelity":
        return (tensorflow1_bilinear(x, 299) - 128) / 128
    return F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1


def features(weights, x):
    """{layer: array} of prepared images; `weights` as in the published file."""
    weights = {name: torch.as_tensor(x) for name, x in weights.items()}

    def conv(name, x, stride=1, padding=0):
        x = F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=padding)
        names = ("running_mean", "running_var", "weight", "bias")
        x = F.batch_norm(x, *(weights[f"{name}.bn.{n}"] for n in names), eps=1e-3)
        return F.relu(x)

    def mean(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def a(n, x):
        five = conv(f"{n}.branch5x5_2", conv(f"{n}.branch5x5_1", x), 1, 2)
        three = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), 1, 1)
        three = conv(f"{n}.branch3x3dbl_3", three, 1, 1)
        one, pool = conv(f"{n}.branch1x1", x), conv(f"{n}.branch_pool", mean(x))
        return torch.cat([one, five, three, pool], 1)

    def b(n, x):
        three = conv(f"{n}.branch3x3", x, 2)
        double = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), 1, 1)
        return torch.cat([three, conv(f"{n}.branch3x3dbl_3", double, 2), F.max_pool2d(x, 3, 2)], 1)

    def c(n, x):
        wide, tall = (0, 3), (3, 0)
        seven = conv(f"{n}.branch7x7_2", conv(f"{n}.branch7x7_1", x), 1, wide)
        seven = conv(f"{n}.branch7x7_3", seven, 1, tall)
        double = conv(f"{n}.branch7x7dbl_1", x)
        for i, padding in ((2, tall), (3, wide), (4, tall), (5, wide)):
            double = conv(f"{n}.branch7x7dbl_{i}", double, 1, padding)
        one, pool = conv(f"{n}.branch1x1", x), conv(f"{n}.branch_pool", mean(x))
        return torch.cat([one, seven, double, pool], 1)

    def d(n, x):
        three = conv(f"{n}.branch3x3_2", conv(f"{n}.branch3x3_1", x), 2)
        seven = conv(f"{n}.branch7x7x3_1", x)
        seven = conv(f"{n}.branch7x7x3_2", seven, 1, (0, 3))
        seven = conv(f"{n}.branch7x7x3_3", seven, 1, (3, 0))
        seven = conv(f"{n}.branch7x7x3_4", seven, 2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def e(n, x, pool):
        def split(name, x):
            sides = (("a", (0, 1)), ("b", (1, 0)))
            return [conv(f"{n}.{name}{letter}", x, 1, padding) for letter, padding in sides]

        three = split("branch3x3_2", conv(f"{n}.branch3x3_1", x))
        double = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), 1, 1)
        double = split("branch3x3dbl_3", double)
        pooled = conv(f"{n}.branch_pool", pool(x))
        return torch.cat([conv(f"{n}.branch1x1", x), *three, *double, pooled], 1)

    found = {}
    x = conv("Conv2d_1a_3x3", x, 2)
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x), 1, 1)
    x = F.max_pool2d(x, 3, 2)
    found["64"] = x.mean((2, 3))
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)), 3, 2)
    found["192"] = x.mean((2, 3))
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = a(name, x)
    x = c("Mixed_6c", c("Mixed_6b", b("Mixed_6a", x)))
    # channels last: the order in which the ADM suite lays them side by side
    spatial = conv("Mixed_6d.branch1x1", x)[:, :7]
    found["spatial"] = spatial.permute(0, 2, 3, 1).flatten(1)
    x = c("Mixed_6e", c("Mixed_6d", x))
    found["768"] = x.mean((2, 3))
    x = e("Mixed_7b", d("Mixed_7a", x), mean)
    x = e("Mixed_7c", x, lambda x: F.max_pool2d(x, 3, 1, 1))
    found["2048"] = x.mean((2, 3))
    found["logits_unbiased"] = found["2048"] @ weights["fc.weight"].T
    found["logits"] = found["logits_unbiased"] + weights["fc.bias"]
    return {name: x.numpy() for name, x in found.items()}


def tensorflow1_bilinear(x, side):
    for axis in (2, 3):
        size = x.shape[axis]
        at = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side)
        low = at.long()
        part = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        below = x.index_select(axis, low)
        above = x.index_select(axis, (low + 1).clamp_max(size - 1))
        x = below + (above - below) * part
    return x
