"""Orbax's manager of RUN/checkpoints that reports a failed background write at once."""

import contextlib
import time

import jax
import orbax.checkpoint as ocp
from etils import epath

from ldm_jax.runtime import storage
from ldm_jax.runtime.log import LOG


class Manager(ocp.CheckpointManager):
    """Writes in the background; a failed write is counted and reported, and nothing older is lost.

    Every process calls the same methods. With several processes, one whose write fails ends its run
    with the error, whatever `max_failed` is: the others wait for it and cannot go on alone.
    """

    def __init__(
        self, folder: epath.Path, max_to_keep: int | None = None, max_failed: int = 0
    ) -> None:
        """max_failed: saves in a row that may fail before `OSError` is raised."""
        self.max_failed, self.failed = max_failed, 0
        """Failed saves in a row: the most allowed, and those so far."""
        self._attempts, self._again_at = 0, None
        self._under_way: tuple[int, int] | None = None
        self._drafts: list[epath.Path] = []
        self._error: Exception | None = None
        self._several = jax.process_count() > 1
        sync = self._sync if self._several else None
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=sync),
        )
        super().__init__(folder, options=options)

    @property
    def retry_due(self) -> bool:
        """A failed save should be tried again now, before the next one is due."""
        return self._again_at is not None and time.monotonic() >= self._again_at

    def check_writes(self) -> None:
        """Count and report a write that has failed meanwhile; called at every step."""
        if self._error is not None:
            self.settle()

    def settle(self, final: bool = False) -> None:
        """Waits for the write under way. OSError if it failed and was one too many, or `final`."""
        under_way, self._under_way = self._under_way, None
        try:
            self.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore have no common class
            cause, self._error = self._error or error, None
            self._failed_write(*(under_way or (0, 0)), cause, final or self._several)
        else:
            if under_way is not None:
                self.failed = self._attempts = 0

    def begin(self, step: int, needed: int, args: ocp.args.Composite) -> bool:
        """Starts a write of about `needed` bytes."""
        self._drafts = []
        self._under_way, self._again_at = (step, needed), None
        return self.save(step, args=args, force=True)

    def _failed_write(self, step: int, needed: int, error: Exception, final: bool) -> None:
        self._attempts += 1
        if not self._several:  # other processes may be writing there still
            self._drafts += self.directory.glob(f"{step}.orbax-checkpoint-tmp*")
            self.remove_drafts()
        self.reload()
        if not final and storage.is_transient(error) and self._attempts < storage.ATTEMPTS:
            delay = storage.WAIT * 2 ** (self._attempts - 1)
            self._again_at = time.monotonic() + delay
            LOG.info(
                f"{self.directory}: the checkpoint of step {step} was not written"
                f" ({storage.reason(error)}); attempt {self._attempts + 1} of {storage.ATTEMPTS}"
                f" follows in {delay:g} s, with the state of that time"
            )
            return
        self._attempts = 0
        self.fail(step, needed, storage.reason(error), final, error)

    def remove_drafts(self) -> None:
        """Remove the drafts of failed writes: they take the room that the next one needs.

        Called again before the next write: a writer thread that had not yet seen the failure may
        have gone on writing.
        """
        for draft in self._drafts:
            if draft.exists():
                with contextlib.suppress(OSError):
                    draft.rmtree()

    def fail(
        self, step: int, needed: int, why: str, final: bool, error: Exception | None = None
    ) -> None:
        """Count a failed save; OSError if it was one too many, or `final`."""
        self.failed += 1
        kept = self.latest_step()
        kept = "no checkpoint is there yet" if kept is None else f"that of step {kept} is kept"
        failed = storage.not_written(self.directory, needed, why)
        told = f"{self.directory}: the checkpoint of step {step} {failed}; {kept}"
        if final or self.failed > self.max_failed:
            limit = "" if final else f" (--max-failed-saves {self.max_failed})"
            raise OSError(f"{told}; make room and run the same command again{limit}") from error
        LOG.info(f"{told}; training goes on, failed saves in a row: {self.failed}")

    def close(self) -> None:
        """Waits for the write under way. OSError if it failed."""
        try:
            self.settle(final=True)
        finally:
            super().close()

    def _wait_for_checkpointers(self) -> None:  # runs in Orbax's thread, which sees errors first
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self._error = error
            raise

    def _sync(self, *, key: str, timeout_ms: int) -> None:
        """A barrier of Orbax's threads; after a failed write the others would wait for ever."""
        if self._error is not None:
            raise RuntimeError("a write of this process has failed")
        self._barrier(key=key, timeout_ms=timeout_ms)
