"""Orbax's manager of RUN/checkpoints, made to say at once when a write in the background failed."""

import jax
import orbax.checkpoint as ocp
from etils import epath

from ldm_jax import cli, storage


class Manager(ocp.CheckpointManager):
    """Writes in the background; a write that fails is counted and said, and nothing older is lost.

    Every process calls the same methods. Of several processes one whose write fails ends its run
    with the error, whatever `max_failed` says: the others wait for it and cannot go on without.
    """

    def __init__(
        self, folder: epath.Path, max_to_keep: int | None = None, max_failed: int = 0
    ) -> None:
        """max_failed: saves in a row that may fail before `OSError` is raised."""
        self.max_failed, self.failed, self.again = max_failed, 0, False
        """`failed` saves in a row; `again` asks for another before the next one is due."""
        self._under_way: tuple[int, int] | None = None
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

    def look(self) -> None:
        """To be called at every step: counts and says a write that has failed meanwhile."""
        if self._error is not None:
            self.settle()

    def settle(self, final: bool = False) -> None:
        """Waits for the write under way. OSError if it failed and was one too many, or `final`."""
        under_way, self._under_way = self._under_way, None
        try:
            self.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore have no common class
            self._error = None
            step, needed = under_way or (0, 0)
            self.again = not self._several and storage.FULL.search(str(error)) is None
            self.fail(step, needed, storage.reason(error), final or self._several, error)
        else:
            self.failed = 0 if under_way else self.failed

    def begin(self, step: int, needed: int, args: ocp.args.Composite) -> bool:
        """Starts a write of about `needed` bytes."""
        self._under_way, self.again = (step, needed), False
        return self.save(step, args=args, force=True)

    def fail(
        self, step: int, needed: int, why: str, final: bool, error: Exception | None = None
    ) -> None:
        """Counts a save that came to nothing; OSError if it was one too many, or `final`."""
        self.failed += 1
        if not self._several:  # other processes may be writing there still
            for draft in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                draft.rmtree()  # it takes the room that the next one needs
        self.reload()
        kept = self.latest_step()
        kept = "no checkpoint is there yet" if kept is None else f"that of step {kept} is kept"
        failed = storage.not_written(self.directory, needed, why)
        told = f"{self.directory}: the checkpoint of step {step} {failed}; {kept}"
        if final or self.failed > self.max_failed:
            limit = "" if final else f" (--max-failed-saves {self.max_failed})"
            raise OSError(f"{told}; make room and run the same command again{limit}") from error
        cli.say(f"{told}; training goes on, failed saves in a row: {self.failed}")

    def close(self) -> None:
        """Waits for the write under way. OSError if it failed."""
        try:
            self.settle(final=True)
        finally:
            super().close()

    def _wait_for_checkpointers(self) -> None:  # in Orbax's thread, which hears of errors first
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self._error = error
            raise

    def _sync(self, *, key: str, timeout_ms: int) -> None:
        """A barrier of Orbax's threads; after a failed write nobody else would come to it."""
        if self._error is not None:
            raise RuntimeError("a write of this process has failed")
        self._barrier(key=key, timeout_ms=timeout_ms)
