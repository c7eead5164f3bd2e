"""Brings parameters to a device for as long as something needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from harmony.capture.graph.structure import flatten
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.trace.tracer import fake_parameters


class Lender:
    """Gives a shell its parameters for as long as a step needs them.

    Attributes:
        fakes: what is in their places between times: fake tensors of the same form and device.
    """

    def __init__(self, source: nn.Module, shell: ModuleShell) -> None:
        self._params = dict(source.named_parameters())
        self._shell = shell
        self.fakes = fake_parameters(shell, shell.device)
        self._names = {id(fake): name for name, fake in self.fakes.items()}

    def name_of(self, tensor: Any) -> str | None:
        """Return the name of the parameter that a fake tensor stands for, or None."""
        return self._names.get(id(tensor))

    def names_in(self, module: nn.Module) -> list[str]:
        """The names of a module's parameters that are not lent now."""
        names = {self.name_of(param) for param in module.parameters()}
        return sorted(name for name in names if name is not None)

    @contextmanager
    def lent(self, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Put the parameters in their places on the device, until the block ends."""
        device = self._shell.device
        real: dict[str, torch.Tensor] = {}
        for name in names:
            param = self._params[name]
            data = param.detach().to(self.fakes[name].dtype).to(device, copy=True)
            real[name] = nn.Parameter(data, requires_grad=param.requires_grad)
        self._shell.bind(real)
        try:
            yield real
        finally:
            self._shell.bind({name: self.fakes[name] for name in names})
            for tensor in real.values():  # autograd's graph holds on to the tensor itself
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=device)

    @contextmanager
    def among(self, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any, dict[str, torch.Tensor]]]:
        """Replace fakes among arguments by what they stand for, until the block ends.

        Yields:
            The arguments, and the parameters among them by name.
        """
        leaves, structure = flatten((args, kwargs))
        names = [self.name_of(leaf) for leaf in leaves]
        wanted = sorted({name for name in names if name is not None})
        if not wanted:
            yield args, kwargs, {}
            return
        with self.lent(wanted) as real:
            pairs = zip(leaves, names, strict=True)
            args, kwargs = structure.unflatten(
                [leaf if name is None else real[name] for leaf, name in pairs]
            )
            yield args, kwargs, real

    def handed_on(self, out: Any, real: dict[str, torch.Tensor]) -> Any:
        """Put the fake in the place of a parameter that a call has returned as it is."""
        names = {id(tensor): name for name, tensor in real.items()}
        leaves, structure = flatten(out)
        if not any(id(leaf) in names for leaf in leaves):
            return out
        return structure.unflatten(
            [self.fakes[names[id(leaf)]] if id(leaf) in names else leaf for leaf in leaves]
        )
