"""The tasks of one training step and what each reads and writes.

A task is a pack of layers times FORWARD, BACKWARD, UPDATE, LATE_UPDATE, NORMS or ACCUMULATE, for
one microbatch. It names no GPU: it is bound late (PVLDB 2022, section 3.2). Edges are not declared
anywhere, they follow from the reads and writes, in the order in which plain PyTorch would run the
tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property, lru_cache

import networkx as nx

from harmony.core.layergraph import LayerGraph
from harmony.errors import PlanError

Samples = tuple[int, int]
"""A microbatch: the half-open range of samples of the minibatch that it holds."""


class _Hashed:
    """Names of tasks and tensors are looked up by the million: their hash is computed once.

    They have slots: a search makes hundreds of thousands of objects, and the garbage collector
    would walk the dictionary of each besides.
    """

    __slots__ = ("_hash",)

    _hash: int

    def __hash__(self) -> int:
        return self._hash

    def _values(self) -> tuple[object, ...]:
        raise NotImplementedError

    def __reduce__(self) -> tuple[object, ...]:
        # Made anew where it is loaded: hashes of members of an Enum differ by process.
        return type(self), self._values()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self._values()))


@dataclass(frozen=True, order=True, slots=True)
class Pack(_Hashed):
    """Layers ``first`` to ``last - 1``; text form ``[first:last]``."""

    first: int
    last: int

    __hash__ = _Hashed.__hash__

    def _values(self) -> tuple[object, ...]:
        return self.first, self.last

    def __str__(self) -> str:
        return f"[{self.first}:{self.last}]"

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.first <= layer < self.last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))


class TensorKind(Enum):
    """What a tensor is; the value is its text form."""

    WEIGHTS = "W"
    SHARED = "T"
    WEIGHT_GRADIENTS = "dW"
    SHARED_GRADIENTS = "dT"
    STATE = "K"
    VALUE = "X"
    VALUE_GRADIENT = "dX"
    SAVED = "S"
    PRODUCTS = "P"

    # Enum hashes names in Python; members are singletons, and the planner hashes them a lot.
    __hash__ = object.__hash__


_KEPT = frozenset({TensorKind.SAVED, TensorKind.PRODUCTS})
_BY_LAYER = _KEPT | {TensorKind.WEIGHTS, TensorKind.WEIGHT_GRADIENTS, TensorKind.STATE}
_BY_SAMPLES = _KEPT | {TensorKind.VALUE, TensorKind.VALUE_GRADIENT}
_GRADIENTS = frozenset({TensorKind.WEIGHT_GRADIENTS, TensorKind.SHARED_GRADIENTS})
_REF = re.compile(r"(dW|dT|dX|W|T|K|X|S|P)(?:\[(\d+):(\d+)\]|(\d+))(?:@(\d+):(\d+))?(?:%(\d+))?")


@dataclass(frozen=True, slots=True)
class TensorRef(_Hashed):
    """A tensor of the step, wherever it lives.

    Text forms: ``W[4:8]`` and ``K[4:8]`` (weights and optimizer state of a pack), ``dW[4:8]%1``
    (part 1 of its gradients), ``T0`` and ``dT0%1`` (a shared parameter), ``X4@0:8`` and
    ``dX4@0:8`` (a value and its gradient, for samples 0 to 7), ``S[4:8]@0:8`` (what a pack's
    forward saves for its backward), ``P[4:8]@0:8`` (of that only the results of its products).

    Attributes:
        first, last: the layers, for kinds kept per layer; else ``first`` is the id of the value
            or shared parameter and ``last`` is ``first + 1``.
        part: which partial sum of the gradient; parts are added in ascending order.
    """

    kind: TensorKind
    first: int
    last: int
    samples: Samples | None = None
    part: int = 0

    __hash__ = _Hashed.__hash__

    def _values(self) -> tuple[object, ...]:
        return self.kind, self.first, self.last, self.samples, self.part

    def __str__(self) -> str:
        index = f"[{self.first}:{self.last}]" if self.kind in _BY_LAYER else str(self.first)
        samples = f"@{self.samples[0]}:{self.samples[1]}" if self.samples else ""
        part = f"%{self.part}" if self.kind in _GRADIENTS else ""
        return f"{self.kind.value}{index}{samples}{part}"

    @property
    def is_gradient_part(self) -> bool:
        """Whether it is a partial sum of the gradient of parameters."""
        return self.kind in _GRADIENTS

    @property
    def is_parameter(self) -> bool:
        """Whether it is weights, of a pack or shared."""
        return self.kind in (TensorKind.WEIGHTS, TensorKind.SHARED)

    @property
    def is_value(self) -> bool:
        """Whether it belongs to a microbatch: a value, its gradient, or what a forward saved."""
        return self.kind in _BY_SAMPLES

    @property
    def is_kept(self) -> bool:
        """Whether a FORWARD leaves it for the BACKWARD of its pack and nobody else."""
        return self.kind in _KEPT

    @property
    def num_samples(self) -> int:
        """Samples of its microbatch; 0 if it has none."""
        return 0 if self.samples is None else self.samples[1] - self.samples[0]

    def nbytes(self, graph: LayerGraph) -> int:
        """Bytes of this tensor."""
        if self.kind is TensorKind.SAVED:
            return graph.saved_nbytes(self.first, self.last, self.num_samples)
        if self.kind is TensorKind.PRODUCTS:
            return graph.products_nbytes(self.first, self.last, self.num_samples)
        if self.is_value:
            return graph.values[self.first].nbytes(self.num_samples)
        if self.kind is TensorKind.SHARED:
            return graph.shared[self.first].nbytes
        if self.kind is TensorKind.SHARED_GRADIENTS:
            return graph.shared[self.first].gradient_nbytes
        layers = graph.layers[self.first : self.last]
        if self.kind is TensorKind.WEIGHTS:
            return sum(layer.weight_nbytes for layer in layers)
        if self.kind is TensorKind.WEIGHT_GRADIENTS:
            return sum(layer.gradient_nbytes for layer in layers)
        return sum(layer.state_nbytes for layer in layers)

    @staticmethod
    def parse(text: str) -> TensorRef:
        """Read the text form back.

        Raises:
            PlanError: if it is not the text of a tensor.
        """
        match = _REF.fullmatch(text)
        if match is None:
            raise PlanError(f"not a tensor: {text!r}. Expected something like W[4:8] or X4@0:8")
        kind = TensorKind(match[1])
        by_range = match[2] is not None
        if by_range is not (kind in _BY_LAYER) or (match[5] is not None) is not (
            kind in _BY_SAMPLES
        ):
            raise PlanError(f"not a tensor: {text!r}. {match[1]} is written another way")
        first = int(match[2] if by_range else match[4])
        last = int(match[3]) if by_range else first + 1
        samples = (int(match[5]), int(match[6])) if match[5] is not None else None
        return TensorRef(kind, first, last, samples, int(match[7] or 0))


# A step names the same tensors again and again, and finds one that is the same object soonest.
_interned = lru_cache(maxsize=2**16)


@_interned
def weights(pack: Pack) -> TensorRef:
    """``W[a:b]``: parameters and buffers that only the pack's layers use."""
    return TensorRef(TensorKind.WEIGHTS, pack.first, pack.last)


@_interned
def weight_gradients(pack: Pack, part: int = 0) -> TensorRef:
    """``dW[a:b]%part``: a partial sum of their gradients."""
    return TensorRef(TensorKind.WEIGHT_GRADIENTS, pack.first, pack.last, None, part)


@_interned
def state(pack: Pack) -> TensorRef:
    """``K[a:b]``: optimizer state of the pack (and of the shared parameters it updates)."""
    return TensorRef(TensorKind.STATE, pack.first, pack.last)


@_interned
def shared(param: int) -> TensorRef:
    """``Tk``: a shared parameter."""
    return TensorRef(TensorKind.SHARED, param, param + 1)


@_interned
def shared_gradient(param: int, part: int) -> TensorRef:
    """``dTk%part``: a partial sum of its gradient."""
    return TensorRef(TensorKind.SHARED_GRADIENTS, param, param + 1, None, part)


@_interned
def value(index: int, samples: Samples) -> TensorRef:
    """``Xv@a:b``: a value for a microbatch."""
    return TensorRef(TensorKind.VALUE, index, index + 1, samples)


@_interned
def value_gradient(index: int, samples: Samples) -> TensorRef:
    """``dXv@a:b``: the gradient of the loss with respect to a value."""
    return TensorRef(TensorKind.VALUE_GRADIENT, index, index + 1, samples)


@_interned
def saved(pack: Pack, samples: Samples) -> TensorRef:
    """``S[a:b]@c:d``: what the forward of a pack saves for its backward."""
    return TensorRef(TensorKind.SAVED, pack.first, pack.last, samples)


@_interned
def products(pack: Pack, samples: Samples) -> TensorRef:
    """``P[a:b]@c:d``: the results of a pack's products, which its backward need not redo."""
    return TensorRef(TensorKind.PRODUCTS, pack.first, pack.last, samples)


class TaskKind(Enum):
    """What a task does with its pack; the value is its text form."""

    FORWARD = "F"
    BACKWARD = "B"
    UPDATE = "U"
    LATE_UPDATE = "L"
    NORMS = "N"
    ACCUMULATE = "A"

    __hash__ = object.__hash__


_TASK = re.compile(r"([FBULN])\[(\d+):(\d+)\](?:@(\d+):(\d+))?|A\((.+)\)")


@dataclass(frozen=True, slots=True)
class Task(_Hashed):
    """One unit of work.

    ``F[4:8]@0:4`` runs the pack forward, keeping only its outputs. ``B[4:8]@0:4`` recomputes it
    from its inputs and runs it backward; where F writes and B reads ``S[4:8]@0:4``, nothing is
    recomputed, and with ``P[4:8]@0:4`` no product. ``U[4:8]`` updates its parameters from their
    complete gradients, on the host. ``L[4:8]`` does so at the start of the step after, from the
    gradients that a step has left; ``N[4:8]``, in the step that leaves them, takes the norms of
    these gradients, for clipping. ``A(dW[4:8]%1)`` adds a partial sum to the gradient, on the
    host.

    Attributes:
        samples: the microbatch, for FORWARD and BACKWARD.
        addend: the partial sum that an ACCUMULATE adds.
    """

    kind: TaskKind
    pack: Pack
    samples: Samples | None = None
    addend: TensorRef | None = None

    __hash__ = _Hashed.__hash__

    def _values(self) -> tuple[object, ...]:
        return self.kind, self.pack, self.samples, self.addend

    def __str__(self) -> str:
        if self.addend is not None:
            return f"A({self.addend})"
        samples = f"@{self.samples[0]}:{self.samples[1]}" if self.samples else ""
        return f"{self.kind.value}{self.pack}{samples}"

    @property
    def num_samples(self) -> int:
        """Samples of its microbatch; 0 if it has none."""
        return 0 if self.samples is None else self.samples[1] - self.samples[0]

    @staticmethod
    def parse(text: str) -> Task:
        """Read the text form back.

        Raises:
            PlanError: if it is not the text of a task.
        """
        match = _TASK.fullmatch(text)
        if match is None:
            raise PlanError(f"not a task: {text!r}. Expected something like F[4:8]@0:4")
        if match[6] is not None:
            addend = TensorRef.parse(match[6])
            return Task(TaskKind.ACCUMULATE, Pack(addend.first, addend.last), None, addend)
        samples = (int(match[4]), int(match[5])) if match[4] is not None else None
        kind = TaskKind(match[1])
        if (samples is not None) is not (kind in (TaskKind.FORWARD, TaskKind.BACKWARD)):
            raise PlanError(f"not a task: {text!r}. F and B name a microbatch, others do not")
        return Task(kind, Pack(int(match[2]), int(match[3])), samples)


class Phase(Enum):
    """Which tasks a step has.

    ``TRAIN``: FORWARD, BACKWARD (the last pack's forward fused into its BACKWARD), UPDATE.
    ``FORWARD``: FORWARD of every pack, keeping what the BACKWARD will need on the host.
    ``BACKWARD``: BACKWARD of every pack, from gradients of the outputs that come from outside.
    ``INFER``: FORWARD of every pack, keeping nothing.
    """

    TRAIN = "train"
    FORWARD = "forward"
    BACKWARD = "backward"
    INFER = "infer"


@dataclass(frozen=True)
class StepSpec:
    """The four-tuple (U_F, P_F, U_B, P_B) of the paper, and who does what share of the batch.

    Attributes:
        minibatch: samples of the step.
        forward_size, backward_size: samples of a microbatch (the last may be smaller).
        forward_packs, backward_packs: packs in ascending order that partition the layers. For
            ``Phase.TRAIN`` the FORWARD packs end where the last BACKWARD pack begins.
        shares: per replica the samples that it trains on; one share means no replication
            (Harmony-PP), N shares are Harmony-DP.
        phase: which tasks the step has.
        saved: BACKWARD packs that are FORWARD packs as well and whose BACKWARD uses what their
            FORWARD saved instead of recomputing it; with equal sizes only. Where BACKWARDs have a
            step of their own, that is there when it begins.
        saved_runs: of how many microbatches a replica saves that, of each of those packs, spread
            evenly; 0 for all of them. So a link, or memory, that is too small for all can be used.
        late: BACKWARD packs that are updated at the start of the step after, each before its next
            FORWARD; ``Phase.TRAIN`` only.
        rounds: into how many groups of consecutive microbatches a step is parted. Each group runs
            FORWARD and BACKWARD before the next one begins, so that only the activations of one
            are held at a time; weights move once a round, and gradients grow from round to round.
            One share with equal sizes only, ``Phase.TRAIN``.
        products: packs, of the same kind as ``saved``, whose FORWARDs leave the results of their
            products (of matrices, convolutions, attention) for the BACKWARD, which recomputes the
            rest.
        products_runs: of how many microbatches a round they leave that, spread evenly over those
            of which the pack does not save everything; 0 for all of these.
        interleaved: whether the FORWARDs of a round run between the BACKWARDs of the round before,
            pack by pack, so that what they leave for the host has the time of both to get there.
            The FORWARDs of the first and the BACKWARDs of the last have no others beside them: of
            these two rounds a pack that is in ``products`` too leaves no more than that.
    """

    minibatch: int
    forward_size: int
    backward_size: int
    forward_packs: tuple[Pack, ...]
    backward_packs: tuple[Pack, ...]
    shares: tuple[Samples, ...]
    phase: Phase = Phase.TRAIN
    saved: tuple[Pack, ...] = ()
    saved_runs: int = 0
    late: tuple[Pack, ...] = ()
    rounds: int = 1
    products: tuple[Pack, ...] = ()
    products_runs: int = 0
    interleaved: bool = False

    @cached_property
    def _saved(self) -> frozenset[Pack]:
        return frozenset(self.saved)

    @cached_property
    def _products(self) -> frozenset[Pack]:
        return frozenset(self.products)

    @property
    def kept(self) -> tuple[Pack, ...]:
        """Packs that leave anything for their BACKWARD: in ``saved``, ``products`` or both."""
        return tuple(sorted({*self.saved, *self.products}))

    def kept_by(self, pack: Pack, replica: int, samples: Samples) -> TensorRef | None:
        """What the FORWARD of a pack leaves of a microbatch for its BACKWARD; None for nothing."""
        if self.saves(pack, replica, samples):
            return saved(pack, samples)
        if pack not in self._products:
            return None
        index, count = self._place(replica, samples)
        some = pack in self._saved and not self._is_alone(replica, samples)
        wanted = self.saved_runs if some else 0
        # Its place among the microbatches of which not everything is saved.
        index, count = index - index * wanted // count, count - wanted
        chosen = _is_chosen(index, count, self.products_runs or count)
        return products(pack, samples) if chosen else None

    def saves(self, pack: Pack, replica: int, samples: Samples) -> bool:
        """Whether the BACKWARD of a pack uses what its FORWARD of a microbatch saved."""
        if pack not in self._saved:
            return False
        if pack in self._products and self._is_alone(replica, samples):
            return False
        index, count = self._place(replica, samples)
        return _is_chosen(index, count, self.saved_runs or count)

    def _is_alone(self, replica: int, samples: Samples) -> bool:
        """Whether a microbatch is of the first or the last of interleaved rounds."""
        each = self.runs_of_round(replica) * self.forward_size
        number = (samples[0] - self.shares[replica][0]) // each
        return self.interleaved and number in (0, self.rounds - 1)

    def _place(self, replica: int, samples: Samples) -> tuple[int, int]:
        """Which microbatch of its round one is, and of how many."""
        low, count = self.shares[replica][0], self.runs_of_round(replica)
        return (samples[0] - low) // self.forward_size % count, count

    def runs_of_round(self, replica: int) -> int:
        """Microbatches of a replica in each round; the last round may have fewer."""
        return -(-self.num_microbatches(replica, TaskKind.FORWARD) // self.rounds)

    def an_earlier_round(self, samples: Samples) -> Samples | None:
        """The microbatch with this one's place in the last round that is over when it begins.

        None if there is none.
        """
        back = self.runs_of_round(0) * self.forward_size * (2 if self.interleaved else 1)
        low = samples[0] - back
        return None if self.rounds == 1 or low < 0 else (low, low + self.forward_size)

    def first_rounds(self, number: int) -> StepSpec:
        """The four-tuple of a step that is the first rounds of this one."""
        if self.rounds <= number:
            return self
        samples = number * self.runs_of_round(0) * self.forward_size
        return replace(self, minibatch=samples, shares=((0, samples),), rounds=number)

    def microbatches(self, replica: int, kind: TaskKind) -> tuple[Samples, ...]:
        """Microbatches of a replica in order, for FORWARD or BACKWARD tasks."""
        starts, size, high = self._starts(replica, kind), self._size(kind), self.shares[replica][1]
        return tuple((at, min(at + size, high)) for at in starts)

    def num_microbatches(self, replica: int, kind: TaskKind) -> int:
        """How many those are; takes no time however many."""
        return len(self._starts(replica, kind))

    def _starts(self, replica: int, kind: TaskKind) -> range:
        return range(*self.shares[replica], self._size(kind))

    def _size(self, kind: TaskKind) -> int:
        return self.forward_size if kind is TaskKind.FORWARD else self.backward_size


def _is_chosen(index: int, count: int, wanted: int) -> bool:
    """Whether one of ``count`` is among the ``wanted`` that are spread evenly over them."""
    return (index + 1) * wanted // count > index * wanted // count


@dataclass
class TaskGraph:
    """Tasks in the order of plain PyTorch, with what each reads and writes.

    Attributes:
        replica_of: the replica of each FORWARD or BACKWARD task; host tasks have none.
        graph: edges ``earlier -> later`` between tasks that touch the same tensor, one of them
            writing.
    """

    layers: LayerGraph
    spec: StepSpec
    tasks: list[Task] = field(default_factory=list)
    reads: dict[Task, tuple[TensorRef, ...]] = field(default_factory=dict)
    writes: dict[Task, tuple[TensorRef, ...]] = field(default_factory=dict)
    replica_of: dict[Task, int] = field(default_factory=dict)
    graph: nx.DiGraph[Task] = field(default_factory=nx.DiGraph)
