"""Configs of first stages that cannot be trained: refused before anything is written."""

import numpy as np
import pytest

from ldm_jax.convert.formats import safetensors_file
from ldm_jax.runtime import cli
from ldm_jax.train import main


@pytest.mark.parametrize(
    ("stage", "flags", "complaint"),
    [
        ("gan", "--loss.r1-interval 0", "loss.r1_interval is 0, but must be at least 1"),
        ("gan", "--loss.disc-start -1", "loss.disc_start is -1, but must be at least 0"),
        ("gan", "--loss.disc-weight -0.5", "loss.disc_weight is -0.5, but must be at least 0"),
        ("gan", "--loss.lecam-weight nan", "--loss.lecam-weight nan is not a finite number"),
        ("gan", "--discriminator.layers 4", "too small for a discriminator of 4 layers"),
        ("gan", "--discriminator.layers 0", "discriminator with layers 0"),
        ("gan", "--loss.revive-codes-after 5", "but this first stage has no codes"),
        ("first_stage", "--loss.r1-weight 1", "loss.r1_weight is 1.0, but the config has no disc"),
        ("vq", "--loss.learn-logvar", "loss.learn_logvar is for KL latents"),
        ("vq", "--train-only decoder", "with train_only decoder the codebook stays"),
        (
            "gan",
            "--loss.perceptual-weight 1",
            "--loss.perceptual-vgg names no file: give VGG16 of torchvision, trained on ImageNet:"
            " vgg16-397923af.pth from",
        ),
        ("gan", "--loss.perceptual-weight 1 --loss.perceptual-vgg FILE",
         "--loss.perceptual-lin names no file: give the last layers of LPIPS"),
        ("gan", "--loss.perceptual-weight 1 --loss.perceptual-vgg FILE --loss.perceptual-lin FILE",
         "is not VGG16 of torchvision"),
        ("gan",
         "--loss.perceptual-weight 1 --loss.perceptual-vgg no.pth --loss.perceptual-lin no.pth",
         "no.pth: No such file or directory; wanted: VGG16 of torchvision"),
        ("gan",
         "--loss.perceptual-weight 1 --loss.perceptual-vgg random --loss.perceptual-lin FILE",
         "goes with a file in loss.perceptual_vgg, not with random features"),
        (
            "gan",
            "--loss.perceptual-weight 1 --loss.perceptual-vgg random --data.size 8"
            " --discriminator.layers 1",
            "LPIPS takes 3 channels (or 1, repeated) and sides of at least 16 pixels",
        ),
    ],
)  # fmt: skip
def test_it_is_refused_and_the_option_named(tmp_path, capsys, stage, flags, complaint):
    other = tmp_path / "other.safetensors"
    safetensors_file.write(other, {"weight": np.zeros(3, np.float32)}, {})
    argv = [f"tiny:{stage}", "--workdir", str(tmp_path / "run")]
    argv += flags.replace("FILE", str(other)).split()
    assert cli.run("ldm-train", main.train, argv) == 1
    (line,) = [e for e in capsys.readouterr().err.splitlines() if "error:" in e]
    assert complaint in line
    assert not (tmp_path / "run").exists()
