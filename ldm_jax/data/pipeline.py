"""Global batches: example r of batch i is example i * B + r of the stream, on every mesh.

The step is the only cursor, so a run resumes by asking for its next step. Each process decodes the
examples that its own devices hold, and no others.
"""

import sys
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from ldm_jax.data.examples import BadDataError, Example, Made, Stream
from ldm_jax.runtime import processes

Batch = dict[str, jax.Array]


def global_batch(stream: Stream, step: int, sharding: jax.sharding.Sharding) -> Batch:
    """Batch `step`: every array [B, ...], its axis 0 laid over the devices by `sharding`.

    Decodes in this thread, at the call; `prefetch` reads ahead. With several processes all call
    this. ValueError when the devices do not divide the batch, and as from `read`.
    """
    local = local_examples(stream.batch_size, sharding)
    examples = read(stream, [step * stream.batch_size + example for example in local])
    return _assemble(stream, examples, local, sharding)


def read(stream: Stream, indices: Sequence[int]) -> list[Example]:
    """Examples of these indices, decoded now; all processes call this, each with its own.

    Raises as `Stream` does, in every process if in any, so that none waits for it in a step.
    """
    what = f"examples {min(indices)} to {max(indices)}"
    return processes.on_all(what, lambda: [stream[i] for i in indices], BadDataError)


def prefetch(stream: Stream, first_step: int, sharding: jax.sharding.Sharding) -> "Batches":
    """Iterator of (step, batch) from `first_step` on, read ahead; batches as from `global_batch`.

    With `workers`, a script that calls this needs the usual `if __name__ == "__main__":`.
    """
    return Batches(stream, first_step, sharding)


class Batches:
    """Decodes `read_ahead` batches ahead in threads or worker processes. Close it, or use `with`.

    An error while reading ahead is raised at the position of its example, and closes it.
    """

    def __init__(self, stream: Stream, first_step: int, sharding: jax.sharding.Sharding):
        self._stream, self._step, self._sharding = stream, first_step, sharding
        self._local = local_examples(stream.batch_size, sharding)
        config, workers = stream.config, max(1, stream.config.workers)
        self._pieces = pieces(self._local, max(1, config.threads) * workers)
        examples = _LocalExamples(stream.made, stream.batch_size, first_step, self._pieces)
        buffer = -(-config.read_ahead * len(self._pieces) // workers)  # of each, rounded up
        threads = min(config.threads, buffer)  # Grain warns of more threads than elements
        ahead = examples.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer if threads else 0)
        )
        if config.workers:
            # Grain's workers read absl flags, which only absl programs have parsed
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=buffer)
            ahead = ahead.mp_prefetch(options)
        self._ahead = iter(ahead)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._ahead is None:
            raise ValueError("these batches were closed: call data.prefetch again")
        try:
            examples = [
                self._stream.accept(made) for _ in self._pieces for made in next(self._ahead)
            ]
        except BaseException:  # part of a batch is lost: later batches would be shifted
            self.close()
            raise
        step, self._step = self._step, self._step + 1
        return step, _assemble(self._stream, examples, self._local, self._sharding)

    def close(self) -> None:
        """Stops the threads or workers."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None  # freed here: at interpreter exit Grain's clean-up would fail

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def batch_of_nan(stream: Stream, sharding: jax.sharding.Sharding) -> Batch:
    """A global batch whose images, or latents, are NaN in this process: a step on it is skipped."""
    local = local_examples(stream.batch_size, sharding)
    example = {
        name: np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 0, dtype)
        for name, (shape, dtype) in stream.spec.items()
    }
    return _assemble(stream, [example] * len(local), local, sharding)


class _LocalExamples(grain.MapDataset):
    """The examples that this process decodes, piece after piece of batch after batch.

    Pieces, not single examples: Grain's iterator costs 0.1 ms for each element.
    """

    def __init__(
        self, made: grain.MapDataset, batch_size: int, first_step: int, pieces: list[list[int]]
    ):
        super().__init__(made)
        self._batch_size, self._first_step, self._pieces = batch_size, first_step, pieces

    def __len__(self) -> int:
        return sys.maxsize  # endless, but Grain asks for a length

    def __getitem__(self, index: int | slice) -> list[Made]:
        if isinstance(index, slice):
            return self.slice(index)
        steps, i = divmod(index, len(self._pieces))
        first = (self._first_step + steps) * self._batch_size
        return [self.parents[0][first + example] for example in self._pieces[i]]


def pieces(examples: list[int], number: int) -> list[list[int]]:
    """`examples` in order as at most `number` lists of nearly equal lengths, none empty."""
    return [part.tolist() for part in np.array_split(examples, min(number, len(examples)))]


def local_examples(batch_size: int, sharding: jax.sharding.Sharding) -> list[int]:
    """Examples of a global batch that the devices of this process hold, each once, ascending.

    Derived from the sharding, not from the process index: where replicas span processes, a slice
    by process index would feed them different data.
    """
    shards = _shards_of_axis_0(sharding)
    if batch_size % shards:
        raise ValueError(
            f"batch {batch_size} is not a multiple of {shards} devices that split it: use "
            f"{max(1, batch_size // shards) * shards}, or another mesh"
        )
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted(
        {example for (index,) in indices for example in range(*index.indices(batch_size))}
    )


def _shards_of_axis_0(sharding: jax.sharding.Sharding) -> int:
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding.num_devices
    names = sharding.spec[0] if sharding.spec else None
    names = (names,) if isinstance(names, str) else names or ()
    return int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int))


def _assemble(
    stream: Stream, examples: list[Example], local: list[int], sharding: jax.sharding.Sharding
) -> Batch:
    """This process's examples as global arrays."""
    place = {example: i for i, example in enumerate(local)}

    def array(name: str) -> jax.Array:
        values = np.stack([example[name] for example in examples])

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            # the examples of a shard are adjacent in `values`
            start, stop, _ = index[0].indices(stream.batch_size)
            return values[place[start] : place[start] + stop - start]

        return jax.make_array_from_callback((stream.batch_size, *values.shape[1:]), sharding, shard)

    return {name: array(name) for name in stream.spec}
