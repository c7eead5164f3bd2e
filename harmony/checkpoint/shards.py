"""The optimizer's state that other processes keep: described, and fetched as it is written.

Process 0 writes the checkpoint of all. It knows the form of every tensor beforehand, asks for one
after the other, and has one of them at a time; the owner of each answers until it hears the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from harmony.checkpoint.optimizers import state_of
from harmony.engine.peers import Peers
from harmony.errors import PeerError
from harmony.runtime.peers.group import PeerGroup

_FORM = "form"
_END = (-1, -1)

Described = Mapping[str, Mapping[str, Any]]
"""State by name of parameter, with forms in the place of tensors."""


def described(optimizer: torch.optim.Optimizer | None, net: nn.Module) -> Described:
    """Describe the state that this process keeps."""
    held = state_of(optimizer, net)
    return {
        name: {
            key: (_FORM, value.dtype, tuple(value.shape))
            if isinstance(value, torch.Tensor)
            else value
            for key, value in state.items()
        }
        for name, state in ({} if held is None else held["state"]).items()
        if isinstance(state, dict)
    }


class RemoteState:
    """What other processes keep, in process 0 while it writes.

    Attributes:
        state: by name of parameter, with tensors that have no memory.
    """

    def __init__(self, group: PeerGroup, parts: Sequence[Described], names: Sequence[str]) -> None:
        """Know what there is.

        Args:
            parts: what each process has described, by rank.
            names: of all parameters, in the same order in all processes.
        """
        self.state: dict[str, dict[str, Any]] = {}
        self._group = group
        self._places: dict[int, tuple[int, int, int]] = {}
        index = {name: number for number, name in enumerate(names)}
        for rank, part in enumerate(parts):
            for name, held in part.items() if rank else ():
                self.state[name] = dict(held)
                tensors = [
                    k for k, v in held.items() if isinstance(v, tuple) and v[:1] == (_FORM,)
                ]
                for number, key in enumerate(tensors):
                    _, dtype, shape = held[key]
                    empty = torch.empty(shape, dtype=dtype, device="meta")
                    self.state[name][key] = empty
                    self._places[id(empty)] = rank, index[name], number

    def put_into(self, optimizer: dict[str, Any]) -> None:
        """Let what `state_of` has found of this process have the others' state as well."""
        state = {**optimizer["state"], **self.state}
        order = [name for group in optimizer["groups"] for name in group["params"]]
        found = {name: state.pop(name) for name in order if name in state}
        optimizer["state"] = {**found, **state}

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of a tensor; of one without memory from the process that keeps it."""
        if id(tensor) not in self._places:
            return tensor
        rank, *wanted = self._places[id(tensor)]

        def asked() -> torch.Tensor:
            self._group.send(torch.tensor(wanted).view(torch.uint8), rank)
            return self._group.receive(tensor.nbytes, rank)

        return self._group.run(asked).view(tensor.dtype).view(tensor.shape)

    def end(self) -> None:
        """Let the others go on."""

        def said() -> None:
            for rank in range(1, self._group.size):
                self._group.send(torch.tensor(_END).view(torch.uint8), rank)

        with suppress(PeerError):  # who is lost needs no word; what comes next says so
            self._group.run(said)


@contextmanager
def remote_state(
    peers: Peers, parts: Sequence[Described], net: nn.Module
) -> Iterator[RemoteState | None]:
    """Let process 0 ask the others for what they keep, in the block; None where all have all."""
    if peers.owners is None:
        yield None
        return
    remote = RemoteState(peers.group, parts, [name for name, _ in net.named_parameters()])
    try:
        yield remote
    finally:
        remote.end()


def answer(peers: Peers, optimizer: torch.optim.Optimizer | None, net: nn.Module) -> None:
    """Give process 0 what it asks for of the state of this process, until it says the end.

    Raises:
        PeerError: if it is gone.
    """
    if peers.owners is None:
        return
    held = state_of(optimizer, net)
    state = {} if held is None else held["state"]
    names = [name for name, _ in net.named_parameters()]
    peers.group.run(lambda: _answers(peers.group, lambda number: state[names[number]]))


def _answers(group: PeerGroup, state_of_number: Callable[[int], Mapping[str, Any]]) -> None:
    while True:
        number, which = group.receive(16, 0).view(torch.int64).tolist()
        if (number, which) == _END:
            return
        tensors = [v for v in state_of_number(number).values() if isinstance(v, torch.Tensor)]
        group.send(tensors[which].detach().cpu().contiguous().view(-1).view(torch.uint8), 0)
