"""The checkpoints of one model: saved, waited for, loaded; by several processes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from harmony.checkpoint.attributes import Attributes
from harmony.checkpoint.saving import Saving
from harmony.checkpoint.shards import RemoteState, answer, remote_state
from harmony.checkpoint.store import step_name
from harmony.checkpoint.training import (
    SHARD,
    Restored,
    load_training,
    own_part,
    part_of,
    snapshot,
)
from harmony.checkpoint.writing import said_by_name
from harmony.core.warn import warn
from harmony.engine.engine import Engine
from harmony.errors import ConfigError, NotSavedError, PeerError


class Checkpoints:
    """Saves and loads; one a model. `Harmony.save_checkpoint` says what is asked for.

    Attributes:
        last: the last checkpoint that was to be written while training goes on.
    """

    def __init__(self, engine: Engine) -> None:
        """Note the attributes of the module, of which only those that change are saved."""
        self._engine = engine
        self._attributes = Attributes(engine.net)
        self.last: Saving | None = None

    def save(
        self,
        root: Path,
        keep: int | None,
        extra: Any,
        async_save: bool,
        objects: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint; of several processes the first writes, and holds what each has."""
        engine, peers = self._engine, self._engine.peers
        if peers is None:
            self._save(root, keep, extra, async_save, objects, ())
            return root / step_name(engine.num_steps)
        with peers.all_of("save_checkpoint", lambda: engine.num_steps):
            engine.whole.check()
            engine.late.flush()
            if peers.unsynced and any(p.grad is not None for p in engine.net.parameters()):
                raise ConfigError(
                    "save_checkpoint behind a backward in model.no_sync(): the gradients are this "
                    "process's own, and only process 0's would be saved. Save behind the "
                    "optimizer's step"
                )
            with said_by_name(root, engine.num_steps):
                own = own_part(engine, objects, extra)
        parts = [part_of(data) for data in peers.bytes_of_all(own)]
        try:
            with peers.all_of("the end of save_checkpoint", lambda: engine.num_steps):
                if peers.group.rank:
                    answer(peers, engine.optimizer, engine.net)
                else:
                    held = [part.pop(SHARD, {}) for part in parts]
                    with remote_state(peers, held, engine.net) as remote:
                        self._save(root, keep, extra, async_save, objects, parts, remote)
        except PeerError as error:
            raise NotSavedError(f"the checkpoint of step {engine.num_steps}: {error}") from None
        return root / step_name(engine.num_steps)

    def _save(
        self,
        root: Path,
        keep: int | None,
        extra: Any,
        async_save: bool,
        objects: Mapping[str, Any],
        parts: Sequence[Mapping[str, Any]],
        remote: RemoteState | None = None,
    ) -> None:
        """Write a checkpoint, with what each of several processes has of its own.

        Args:
            remote: the optimizer's state that other processes keep.
        """
        engine = self._engine
        with engine.lock, engine.whole.naming("save_checkpoint", engine.devices):
            engine.whole.check()
            if keep is not None and keep < 1:
                raise ConfigError(
                    f"keep={keep}: how many checkpoints to keep, at least 1, or None"
                )
            self._wait()
            engine.late.flush()
            with said_by_name(root, engine.num_steps):
                taken = snapshot(engine, self._attributes, objects, extra, parts, remote)
            if async_save and remote is not None:
                warn(
                    "the optimizer's state is shared out over processes (shard_optimizer_state), "
                    "which give it to process 0 before they go on: checkpoints are written before "
                    "training goes on"
                )
                async_save = False
            if async_save and (name := taken.unsaved.unseen()) is not None:
                warn(
                    f"something holds the memory of {name} (.data, .detach(), a view or an array) "
                    "and may change it unseen: checkpoints are written before training goes on"
                )
                async_save = False
            if async_save:
                self.last = Saving(taken, root, keep)
                self.last.start()
            else:
                taken.write(root, keep)

    def load(self, folder: Path, objects: Mapping[str, Any], skip_damaged: bool) -> Restored:
        """Bring the run back to where a checkpoint was saved."""
        engine, peers = self._engine, self._engine.peers
        every: AbstractContextManager[None] = nullcontext()
        if peers is not None:
            every = peers.all_of("load_checkpoint", lambda: engine.num_steps)
        with engine.lock, every:
            self._wait()
            engine.late.flush()
            restored = load_training(engine, folder, objects, skip_damaged)
            if peers is not None:
                peers.values_were_set()
        for why in restored.skipped:
            warn(f"passed over a damaged checkpoint: {why}")
        return restored

    def finish(self) -> None:
        """Wait until the last one is written.

        Raises:
            NotSavedError: if it could not be. What was saved before is whole.
        """
        saving, self.last = self.last, None
        if saving is not None:
            saving.wait()
            if saving.error is not None:
                raise saving.error

    def _wait(self) -> None:
        """Wait until the last one is over, and warn if there is no checkpoint."""
        if self.last is not None:
            self.last.wait()
            self.last.tell()
            self.last = None
