"""What layers change in their forward beside their outputs: buffers and Python attributes.

Plain PyTorch runs a layer once for each microbatch, in order, and the layer's buffers go from
microbatch to microbatch. Here they lie in the weight slot of the pack while its microbatches run,
so the same happens there; at the end they go to the host, and into the model once the whole step
has succeeded. The recompute, which runs the layer again, starts from what the microbatch had found
and its changes are dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harmony.capture import LayerChanges, ModuleShell
from harmony.planner.ir.tasks import Pack, Samples, Task, TaskKind
from harmony.runtime import native

Attribute = tuple[str, str]
"""Name of a module, and of an attribute of it."""

_MISSING = object()


@dataclass
class _Snapshot:
    """What a microbatch found when it came to a layer."""

    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    attributes: dict[Attribute, Any] = field(default_factory=dict)


class LayerStates:
    """The changes of one forward, on the way from the layers to the model.

    Written and read by the threads of the devices; the schedule orders them, as it does for
    random states.

    Attributes:
        recomputed: whether a BACKWARD will run the layers again.
    """

    def __init__(
        self,
        net: nn.Module,
        changes: Mapping[int, LayerChanges],
        forward_end: int,
        minibatch: int,
        recomputed: bool,
    ) -> None:
        """Start from the state of ``net``.

        Args:
            changes: by layer.
            forward_end: layers below it have a FORWARD task; the others run first in BACKWARD.
            recomputed: whether a BACKWARD will run the layers again.
        """
        self._net = net
        self._changes = changes
        self._forward_end = forward_end
        self._minibatch = minibatch
        self.recomputed = recomputed
        self._snapshots: dict[tuple[int, Samples], _Snapshot] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._running: dict[Attribute, Any] = {}
        if changes:
            modules = dict(net.named_modules())
            for change in changes.values():
                for module, name in change.attributes:
                    held = modules[module].__dict__.get(name, _MISSING)
                    self._running[module, name] = copy.deepcopy(held)

    def enter(self, task: Task, shell: ModuleShell) -> None:
        """Give the layers of a task the state that their microbatch has to find."""
        if not self._changes:
            return
        with torch.no_grad():
            for layer, change in self._in(task.pack):
                key = (layer, _samples(task))
                if self._runs_first(task):
                    _set_attributes(shell, {a: self._running[a] for a in change.attributes})
                    if task.kind is TaskKind.FORWARD and self.recomputed:
                        self._snapshots[key] = self._snapshot(change, shell)
                else:
                    found = self._snapshots[key]
                    _set_attributes(shell, found.attributes)
                    for name, kept in found.buffers.items():
                        shell.tensor(name).copy_(kept, non_blocking=True)
                if change.feeds_outputs:  # others nobody's backward reads
                    shell.lend(change.buffers)

    def leave(self, task: Task, shell: ModuleShell) -> None:
        """Take what the layers of a task have left."""
        if not self._changes:
            return
        for _, change in self._in(task.pack):
            shell.settle(change.buffers)
            if not self._runs_first(task):
                continue
            for attribute in change.attributes:
                self._running[attribute] = copy.deepcopy(_attribute(shell, attribute))
            if _samples(task)[1] == self._minibatch:
                self._pending.update(
                    {n: native.pinned_copy(shell.tensor(n)) for n in change.buffers}
                )

    def commit(self, begun: list[str] | None = None) -> None:
        """Let the model have the changes; nothing happens to it before.

        Args:
            begun: hears when the first change is about to be made; what fails until then, a copy
                of an attribute for instance, leaves the model as it was.
        """
        if not self._changes:
            return
        buffers = dict(self._net.named_buffers(remove_duplicate=False))
        modules = dict(self._net.named_modules())
        pairs = [(name, buffers[name], new) for name, new in self._pending.items()]
        held = [(modules[m], name, copy.deepcopy(h)) for (m, name), h in self._running.items()]
        if begun is not None:
            begun.append("what the forward changes")
        for name, buffer, new in pairs:
            native.trace_host_access(f"the buffer {name}", new, write=False)
            native.trace_host_access(f"the buffer {name}", buffer, write=True)
            buffer.copy_(new)
        self._pending.clear()
        for module, name, value in held:
            _set(module, name, value)

    def _in(self, pack: Pack) -> Iterator[tuple[int, LayerChanges]]:
        return ((layer, self._changes[layer]) for layer in self._changes if layer in pack)

    def _runs_first(self, task: Task) -> bool:
        """Whether this is the forward of its layers, not their recompute."""
        return task.kind is TaskKind.FORWARD or task.pack.first >= self._forward_end

    def _snapshot(self, change: LayerChanges, shell: ModuleShell) -> _Snapshot:
        names = change.buffers if change.feeds_outputs else ()
        return _Snapshot(
            {name: native.pinned_copy(shell.tensor(name)) for name in names},
            {a: copy.deepcopy(_attribute(shell, a)) for a in change.attributes},
        )


def _attribute(shell: ModuleShell, attribute: Attribute) -> Any:
    module, name = attribute
    return shell.modules[module].__dict__.get(name, _MISSING)


def _set_attributes(shell: ModuleShell, values: Mapping[Attribute, Any]) -> None:
    for (module, name), held in values.items():
        _set(shell.modules[module], name, copy.deepcopy(held))


def _set(module: nn.Module, name: str, held: Any) -> None:
    if held is _MISSING:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = held


def _samples(task: Task) -> Samples:
    assert task.samples is not None, "only tasks with a microbatch run on a device"
    return task.samples
