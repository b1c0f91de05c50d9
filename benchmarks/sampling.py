"""`paired.py sampling` under its former name: images with ldm_jax and with diffusers on torch."""

import sys

import paired

if __name__ == "__main__":
    sys.exit(paired.main(["sampling", *sys.argv[1:]]))
