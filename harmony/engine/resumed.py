"""What of a plan decides the last bits of a step, kept to be compared when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from harmony.core.files import check_types
from harmony.core.warn import warn
from harmony.planner.ir.plan import Plan


@dataclass(frozen=True)
class BitChoices:
    """How a batch was parted.

    Attributes:
        minibatch: its samples.
        forward_size, backward_size: samples of a microbatch.
        shares: the samples of each replica, as ranges.
        mode: of the plan.
    """

    minibatch: int
    forward_size: int
    backward_size: int
    shares: tuple[tuple[int, int], ...]
    mode: str = field(compare=False)

    @staticmethod
    def of(plan: Plan) -> BitChoices:
        """Those of a plan."""
        spec = plan.spec
        return BitChoices(
            spec.minibatch, spec.forward_size, spec.backward_size, spec.shares, plan.mode
        )

    @staticmethod
    def of_data(data: Mapping[str, Any]) -> BitChoices:
        """Those of a file.

        Raises:
            TypeError: if it holds something else.
        """
        made = BitChoices(**data)
        check_types(made, BitChoices)
        return made

    def as_data(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    def compare(self, plan: Plan) -> None:
        """Warn if a plan parts batches of this size otherwise."""
        now = BitChoices.of(plan)
        if now == self:
            return
        warn(
            f"the run is resumed with {now}; before it was {self}: sums are taken in another "
            "order, so the last bits may differ from those of a run that was not interrupted. To "
            f"keep them, give microbatch_size={self.backward_size} and mode={self.mode!r} with as "
            "many GPUs as before"
        )

    def __str__(self) -> str:
        replicas = "1 replica" if len(self.shares) == 1 else f"{len(self.shares)} replicas"
        return f"microbatches of {self.backward_size} samples in {replicas}"
