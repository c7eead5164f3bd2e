"""The arena of weights that are computed with in another type than the module has them in.

The module's own parameters are the *masters*: what users and optimizers see, in memory that no
device reads. What streams is a copy of each, made anew whenever the master may have changed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch

from harmony.runtime import native
from harmony.runtime.changes import Changes
from harmony.runtime.host.arena import HostArena
from harmony.runtime.host.arena_layout import ArenaLayout


class WorkingArena(HostArena):
    """Copies of parameters that have masters; everything else as in any arena.

    Attributes:
        masters: where the masters live.
    """

    def __init__(
        self, layout: ArenaLayout, device: torch.device | None, purpose: str, *, always: bool
    ) -> None:
        """Make room for copies, pinned for ``device`` if given, and for masters.

        Args:
            always: make all copies anew whenever they may have to be, whatever the signs say.
        """
        self.masters = HostArena(layout.masters(), None, f"the masters of {purpose}")
        self._always = always
        self._changes = Changes({})
        super().__init__(layout, device, purpose)

    def extend(self, layout: ArenaLayout) -> None:
        """Make room for those tensors of a layout that have none here, or are of another form."""
        masters = layout.masters()
        self.masters.keep({n for n in masters.places if not self._is_given_away(n)})
        self.masters.extend(masters)
        super().extend(layout)

    def keep(self, names: Container[str]) -> None:
        """Let go of all tensors but these, and of the memory that has none any more."""
        self.masters.keep(names)
        super().keep(names)

    def take_in(self, tensors: Mapping[str, torch.Tensor], *, traced_real: bool = False) -> None:
        """Move what is elsewhere to where it belongs, and copy what may have changed."""
        super().take_in(tensors, traced_real=traced_real)
        masters = {name: self.tensors[name] for name in self.masters.views}
        if not self._changes.of(masters):
            self._changes = Changes(masters)
        self.refresh()

    def copies(self, names: Iterable[str]) -> dict[int, torch.Tensor]:
        """Of these masters, the copies that an update may write, by the master's identity."""
        held = {id(self.tensors[n]): self.views[n] for n in names if n in self.masters.views}
        return {key: copy for key, copy in held.items() if copy.dtype is torch.bfloat16}

    def refresh(
        self, names: Iterable[str] | None = None, copied: Container[int] = frozenset()
    ) -> None:
        """Copy those of these masters, or of all, that may have changed."""
        for name in self.masters.views if names is None else names:
            if name not in self.masters.views:
                continue
            if self._changes.take(name, self.num_moves[name]) or self._always:
                master, copy = self.tensors[name], self.views[name]
                native.trace_host_access(f"the copy of {name}", copy, write=True)
                if id(master) not in copied:
                    with torch.no_grad():
                        copy.copy_(master)

    def _arena_of(self, name: str) -> HostArena:
        return self.masters if name in self.masters.views else self
