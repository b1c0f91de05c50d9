"""Bounds of a request to the server, checked before anything is allocated."""

import dataclasses


class RefusedError(ValueError):
    """A request that the server does not take."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status: 400, 404, 413, 422, 503, 507."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most of everything."""

    pixels: int = 2048 * 2048
    """Of a picture that is drawn, read, or enlarged to."""
    images: int = 64
    """Of a request: batch_size times n_iter."""
    batch: int = 16
    """Images of one call of the program."""
    steps: int = 150
    prompt: int = 20_000
    """Characters of a prompt or of a negative one."""
    body: int = 64 * 2**20
    """Bytes of a request."""
    queue: int = 64
    """Requests that wait."""

    def size(self, width: int, height: int, what: str = "the picture") -> None:
        """RefusedError for a picture of too many pixels."""
        if width * height > self.pixels:
            raise RefusedError(
                422,
                f"{what} is {width}x{height} (width x height), which is more than the"
                f" {self.pixels:,} pixels of --max-pixels",
            )

    def count(self, batch: int, rounds: int) -> None:
        """RefusedError for too many pictures in a call, or in all."""
        if not 1 <= batch <= self.batch:
            raise RefusedError(422, f"batch_size {batch} is not in 1..{self.batch}")
        if not 1 <= rounds <= self.images // batch:
            raise RefusedError(
                422,
                f"n_iter {rounds} is not in 1..{self.images // batch}: {self.images} pictures of"
                f" a request at most, and batch_size is {batch}",
            )

    def texts(self, **named: str) -> None:
        """RefusedError for a text that is too long."""
        for name, text in named.items():
            if len(text) > self.prompt:
                raise RefusedError(422, f"{name} has {len(text)} characters, {self.prompt} at most")
