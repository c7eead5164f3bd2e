"""The schedule: what every stream of every device does in one step, as data with a text form.

It is the only description of a step: `verify` checks it, `simulate` predicts it, the executor
runs it. A schedule has one *program* a host thread: one a device, and ``host`` for the updates.
A program is the list of instructions in the order in which its thread issues them; each goes to
one stream. A stream runs its instructions in order; different streams are ordered by events only.

    Alloc  W[4:8] slot 1         memory for a tensor, taken in the order of the compute stream
    SwapIn W[4:8]                host -> device, on h2d
    Run F[4:8]@0:4 (W[4:8] X4@0:4) -> X8@0:4
                                 a task on the compute stream (or, on the host, on update); its
                                 outputs get their memory as it runs
    SwapOut dW[4:8]%0            device -> host, on d2h; "stage 2" lands in staging buffer 2
                                 instead of in the gradient arena, "over X4@0:8" in the memory of a
                                 value that nobody reads on the host any more
    Send X8@0:4 gpu1             device -> device, on p2p of the sender
    Drop X8@0:4                  gives the memory back, in the order of the compute stream
    Record e7 / Wait e7          an event; each is recorded once a step

Tensors that a device's ``resident=`` names (weights, their gradients, optimizer state) have memory
of their own there from step to step: they are neither taken nor dropped. Their UPDATE is a Run of
that device, and a SwapOut writes the new weights to the host.

In a loop of one's own FORWARDs and BACKWARDs have a schedule each. What the first leave on a
device for the second is ``left=`` there when the one ends and ``found=`` when the other begins.

Memory of a device changes hands only in the order of its compute stream: Alloc and Drop are
compute instructions, and a copy on another stream must be ordered after the Alloc and before the
Drop by events. So the bytes in use are a property of the program, not of timing, and no allocator
ever has to guess when another stream is done.

Text form, one instruction a line, stream first::

    schedule minibatch=16
    device gpu0 memory=67108864 weight_slots=2x1048576 gradient_slots=2x1048576
    program gpu0
      compute Alloc W[0:2] slot 0
      compute Record e0
      h2d     Wait e0
      ...
    program host
      update  Wait e12
      update  Run U[4:8] (dW[4:8]%0 K[4:8] W[4:8]) -> K[4:8] W[4:8]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from harmony.errors import PlanError
from harmony.planner.ir.tasks import Task, TensorKind, TensorRef

HOST = "host"
DEVICE_STREAMS = ("compute", "h2d", "d2h", "p2p")
HOST_STREAM = "update"


class Op(Enum):
    """What an instruction does; the value is its text form."""

    RUN = "Run"
    ALLOC = "Alloc"
    SWAP_IN = "SwapIn"
    SWAP_OUT = "SwapOut"
    SEND = "Send"
    DROP = "Drop"
    RECORD = "Record"
    WAIT = "Wait"


class Instruction(NamedTuple):
    """One step of a program.

    Attributes:
        stream: ``compute``, ``h2d``, ``d2h``, ``p2p``, or ``update`` on the host.
        task, reads, writes: of a Run.
        ref: the tensor of an Alloc, SwapIn, SwapOut, Send or Drop.
        slot: of an Alloc of weights or gradients, the slot it takes; of a SwapOut of gradients,
            the staging buffer it lands in, or None for the gradient arena.
        peer: the receiving device of a Send.
        event: of a Record or Wait.
        over: of a SwapOut, the value on the host that this one takes the memory of.
    """

    stream: str
    op: Op
    task: Task | None = None
    reads: tuple[TensorRef, ...] = ()
    writes: tuple[TensorRef, ...] = ()
    ref: TensorRef | None = None
    slot: int | None = None
    peer: int | None = None
    event: int | None = None
    over: TensorRef | None = None

    def __str__(self) -> str:
        if self.op is Op.RUN:
            ins = " ".join(map(str, self.reads))
            outs = " ".join(map(str, self.writes))
            return f"Run {self.task} ({ins}) -> {outs}".rstrip()
        if self.event is not None:
            return f"{self.op.value} e{self.event}"
        tail = "" if self.peer is None else f" gpu{self.peer}"
        if self.slot is not None:
            tail = f" {'stage' if self.op is Op.SWAP_OUT else 'slot'} {self.slot}"
        if self.over is not None:
            tail = f" over {self.over}"
        return f"{self.op.value} {self.ref}{tail}"


@dataclass(frozen=True)
class Slots:
    """Equal buffers that hold one pack's weights, or one pack's gradients, each."""

    count: int = 0
    nbytes: int = 0

    def __str__(self) -> str:
        return f"{self.count}x{self.nbytes}"

    @property
    def total_nbytes(self) -> int:
        """Bytes of all slots together."""
        return self.count * self.nbytes


@dataclass(frozen=True)
class DeviceSpec:
    """What the schedule may use of a device.

    Attributes:
        memory_nbytes: its limit.
        weight_slots, gradient_slots: buffers that exist during the whole step.
        stages: host staging buffers, for gradient parts that are added on the host.
        resident: tensors that are on the device when a step begins and when it ends.
        left: what FORWARDs leave on the device for BACKWARDs of a schedule of their own.
        found: what such BACKWARDs find on the device when that schedule begins.
    """

    memory_nbytes: int
    weight_slots: Slots = Slots()
    gradient_slots: Slots = Slots()
    stages: Slots = Slots()
    resident: tuple[TensorRef, ...] = ()
    left: tuple[TensorRef, ...] = ()
    found: tuple[TensorRef, ...] = ()

    def __str__(self) -> str:
        named = (("resident", self.resident), ("left", self.left), ("found", self.found))
        lists = "".join(f" {name}={','.join(map(str, refs))}" for name, refs in named if refs)
        return (
            f"memory={self.memory_nbytes} weight_slots={self.weight_slots}"
            f" gradient_slots={self.gradient_slots} stages={self.stages}{lists}"
        )


def resident_groups(refs: Sequence[TensorRef]) -> list[tuple[TensorRef, ...]]:
    """Split what is resident on a device by pack: each pack's weights come first."""
    groups: list[list[TensorRef]] = []
    for ref in refs:
        if ref.kind is TensorKind.WEIGHTS or not groups:
            groups.append([])
        groups[-1].append(ref)
    return [tuple(group) for group in groups]


@dataclass(frozen=True)
class Schedule:
    """One step: a program a device, in the order of the devices, and one for the host."""

    minibatch: int
    devices: tuple[DeviceSpec, ...]
    programs: tuple[tuple[Instruction, ...], ...]
    host: tuple[Instruction, ...] = ()

    @property
    def num_devices(self) -> int:
        """How many devices the schedule uses."""
        return len(self.devices)

    def all_programs(self) -> Iterator[tuple[str, tuple[Instruction, ...]]]:
        """Pairs of a program's name (``gpu0``, ..., ``host``) and its instructions."""
        for index, program in enumerate(self.programs):
            yield f"gpu{index}", program
        yield HOST, self.host

    def __str__(self) -> str:
        lines = [f"schedule minibatch={self.minibatch}"]
        for index, device in enumerate(self.devices):
            lines.append(f"device gpu{index} {device}")
        for name, program in self.all_programs():
            lines.append(f"program {name}")
            lines.extend(f"  {step.stream:<7} {step}" for step in program)
        return "\n".join(lines) + "\n"

    @staticmethod
    def parse(text: str) -> Schedule:
        """Read the text form back; ``Schedule.parse(str(s)) == s``.

        Raises:
            PlanError: with the number and the text of the line that cannot be read.
        """
        return _Parser().parse(text)


_HEADER = re.compile(r"schedule minibatch=(\d+)")
_DEVICE = re.compile(
    r"device gpu(\d+) memory=(\d+) weight_slots=(\d+)x(\d+) gradient_slots=(\d+)x(\d+)"
    r" stages=(\d+)x(\d+)(?: resident=(\S+))?(?: left=(\S+))?(?: found=(\S+))?"
)
_RUN = re.compile(r"Run (\S+) \((.*?)\) ->\s*(.*)")
_EVENT = re.compile(r"(Record|Wait) e(\d+)")
_MOVE = re.compile(
    r"(Alloc|SwapIn|SwapOut|Send|Drop) (\S+)(?: (?:slot|stage) (\d+)| gpu(\d+)| over (\S+))?"
)


class _Parser:
    """Reads the text form, line by line."""

    def __init__(self) -> None:
        self.minibatch = 0
        self.devices: list[DeviceSpec] = []
        self.programs: dict[str, list[Instruction]] = {}
        self.current: list[Instruction] | None = None

    def parse(self, text: str) -> Schedule:
        for number, line in enumerate(text.splitlines(), 1):
            stripped = line.strip()
            if not stripped or stripped.startswith("#"):
                continue
            try:
                self._line(stripped)
            except PlanError as error:
                raise PlanError(f"line {number} of the schedule: {error}\n  {line}") from None
        programs = tuple(
            tuple(self.programs.get(f"gpu{index}", ())) for index in range(len(self.devices))
        )
        host = tuple(self.programs.get(HOST, ()))
        return Schedule(self.minibatch, tuple(self.devices), programs, host)

    def _line(self, line: str) -> None:
        if match := _HEADER.fullmatch(line):
            self.minibatch = int(match[1])
        elif match := _DEVICE.fullmatch(line):
            n = [int(group) for group in match.groups()[:8]]
            slots = (Slots(n[2], n[3]), Slots(n[4], n[5]), Slots(n[6], n[7]))
            lists = (match[number].split(",") if match[number] else () for number in (9, 10, 11))
            refs = (tuple(map(TensorRef.parse, each)) for each in lists)
            self.devices.append(DeviceSpec(n[1], *slots, *refs))
        elif line.startswith("program "):
            self.current = self.programs.setdefault(line.split()[1], [])
        elif self.current is None:
            raise PlanError("an instruction outside of a program")
        else:
            self.current.append(parse_instruction(line))


def parse_instruction(line: str) -> Instruction:
    """Read ``"h2d SwapIn W[0:2]"``: a stream and an instruction.

    Raises:
        PlanError: if it is neither.
    """
    stream, _, rest = line.partition(" ")
    rest = rest.strip()
    if stream not in DEVICE_STREAMS and stream != HOST_STREAM:
        known = ", ".join((*DEVICE_STREAMS, HOST_STREAM))
        raise PlanError(f"no such stream: {stream!r}. Streams: {known}")
    if match := _RUN.fullmatch(rest):
        reads = tuple(TensorRef.parse(ref) for ref in match[2].split())
        writes = tuple(TensorRef.parse(ref) for ref in match[3].split())
        return Instruction(stream, Op.RUN, Task.parse(match[1]), reads, writes)
    if match := _EVENT.fullmatch(rest):
        return Instruction(stream, Op(match[1]), event=int(match[2]))
    if match := _MOVE.fullmatch(rest):
        slot = int(match[3]) if match[3] else None
        peer = int(match[4]) if match[4] else None
        over = TensorRef.parse(match[5]) if match[5] else None
        ref = TensorRef.parse(match[2])
        return Instruction(stream, Op(match[1]), ref=ref, slot=slot, peer=peer, over=over)
    raise PlanError(f"not an instruction: {rest!r}")
