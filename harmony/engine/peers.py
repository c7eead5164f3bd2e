"""Several processes that train one model: what they agree on before each step.

Each has its own part of the batch, its own GPUs and its own plan, and all parameters on its host.
Before a step they compare what has to be the same: the model, the optimizer's options, the number
of the step. Whoever cannot begin says so here, so that nobody waits for what never comes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from harmony.capture.graph.params import dense_stride, version_of
from harmony.core.warn import warn
from harmony.engine.peer_facts import (
    compare_states,
    form_of,
    hash_of,
    options_of,
    refuse_own_step,
    state_digests,
    state_of,
)
from harmony.errors import ConfigError, ExecutionError, PeerError, text_of
from harmony.runtime.host.host_state import HostState
from harmony.runtime.peers.chunks import Chunk, OwnedChunk, cut, cut_by_owner
from harmony.runtime.peers.exchange import Arrived, Exchange
from harmony.runtime.peers.group import PeerGroup
from harmony.runtime.peers.owners import Owners
from harmony.runtime.peers.same_values import digests_of, take_from_first
from harmony.runtime.peers.sharded import ShardedExchange
from harmony.runtime.unsaved import about_to_change
from harmony.runtime.update.optimizer import PackOptimizer

HEADER_NBYTES = 2048
"""Of what each process says before a step."""

TRAIN_STEP, FORWARD, BACKWARD = "train_step", "a forward", "a backward"
FORWARD_ALONE = "a forward in no_sync"
"""Kinds of calls that all processes make together."""

_MEANING = {
    "model": "names, shapes or types of parameters and buffers, or which are frozen",
    "optimizer": "the class of the optimizer, its options (a learning rate?) or max_grad_norm",
    "precision": "precision",
    "looks": "detect_nonfinite",
    "step": "the number of the step (num_steps)",
    "kind": "what is called",
}
"""What has to be the same in all processes."""


@dataclass(frozen=True)
class Agreement:
    """What the processes have agreed on for a step.

    Attributes:
        first: the number of the first microbatch of this process, among those of all.
        changed: whether parameters or buffers of this process were replaced by process 0's.
        samples: of each process's part of the batch.
    """

    first: int
    changed: bool
    samples: tuple[int, ...]


class Peers:
    """The other processes, as the engine of one model sees them.

    Attributes:
        group: how they are reached.
        exchange: of the step that runs; None before it is agreed on.
        first_microbatch: the number of this process's first microbatch among those of all.
        unsynced: whether parameters may have gradients that are still to be averaged.
        owners: who keeps the optimizer's state of which parameter; None where all have all.
    """

    def __init__(
        self,
        group: PeerGroup,
        net: nn.Module,
        optimizer: PackOptimizer | None,
        facts: Mapping[str, Any],
        flush: Callable[[], object],
        owners: Owners | None = None,
    ) -> None:
        """Train with the processes of a group.

        Args:
            flush: makes the updates that the last step has left.
            facts: what else has to be the same in all processes.
        """
        self.group = group
        self.exchange: Exchange | None = None
        self.first_microbatch = 0
        self.unsynced = False
        self.owners = owners
        self._net, self._optimizer, self._facts = net, optimizer, dict(facts)
        self._flush = flush
        self._announced, self._kind = False, ""
        self._agreement: Agreement | None = None
        self._is_open = True  # whether somebody may have given parameters other values
        self._marks: dict[str, tuple[int, int]] = {}
        self._chunks: tuple[tuple[Any, ...], tuple[Chunk, ...]] = ((), ())
        self._owned: tuple[tuple[Any, ...], tuple[OwnedChunk, ...]] = ((), ())
        self._hooked: torch.optim.Optimizer | None = None
        self._said: list[dict[str, Any]] = []
        self._warned = False

    def values_were_set(self) -> None:
        """Have the values of parameters compared before the next step."""
        self._is_open = True

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Let the block be a step; the others hear of it if it fails here."""
        self.group.check()
        self.exchange, self._announced, self._agreement = None, False, None
        self._kind = ""
        try:
            yield
        except BaseException as error:
            self._tell(number, error)
            raise
        finally:
            exchange, self.exchange = self.exchange, None
        assert exchange is None or exchange.is_agreed, "all gradients have been averaged"

    @contextmanager
    def all_of(self, kind: str, number: Callable[[], int]) -> Iterator[None]:
        """Let the block be something that every process does; go on when all have done it.

        Args:
            kind: what it is.
            number: of the steps trained behind it.

        Raises:
            ConfigError: in all processes, if they differ in what has to be the same.
            PeerError: if it has failed in another process.
        """
        self.group.check()
        self.exchange, self._announced = None, False
        try:
            yield
        except BaseException as error:
            self._tell(number(), error)
            raise
        self._announced = True
        nothing = {"samples": 0, "microbatches": 0, "error": ""}
        self._agree_on(self._header(kind, number(), nothing))

    def largest_of(self, numbers: Sequence[int], step: int) -> list[int]:
        """Return the largest of each of these numbers in any process; all have to come."""
        more = {"samples": 0, "microbatches": 0, "error": "", "numbers": list(numbers)}
        row = self._header("largest_of", step, more)
        self.group.check()
        self._agree_on(row)
        return [max(found) for found in zip(*(s["numbers"] for s in self._said), strict=True)]

    def bytes_of_all(self, data: bytes) -> list[bytes]:
        """Return what each process has given, in the order of the ranks; all have to come."""

        def gathered() -> list[bytes]:
            mine = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
            lengths = self.group.gather(torch.tensor([len(data)]).view(torch.uint8))
            counts = [int(row.view(torch.int64)) for row in lengths]
            row = torch.zeros(max(1, *counts), dtype=torch.uint8)
            row[: len(data)] = mine[: len(data)]
            rows = self.group.gather(row)
            return [
                theirs[:count].numpy().tobytes()
                for theirs, count in zip(rows, counts, strict=True)
            ]

        return self.group.run(gathered)

    def announce(self, kind: str, number: int, samples: int, microbatches: int) -> bool:
        """Agree with all processes that this step is run, if that is not done yet.

        Args:
            kind: of the call.
            number: of the step.
            samples: of this process's part of the batch.
            microbatches: of them.

        Returns:
            Whether parameters or buffers have other values now than before.

        Raises:
            ConfigError: in all processes, if they differ in what has to be the same.
            PeerError: if another process has failed, or is gone.
        """
        if self._announced:
            if self.exchange is not None and self.exchange.has_begun:
                raise ExecutionError(
                    f"step {number} was to be run in another way when gradients of it had been "
                    "given to other processes already. No parameter was changed"
                )
            return False
        if kind == TRAIN_STEP and self._optimizer is not None:
            self._optimizer.check_shardable()
        self._announced, self._kind = True, kind
        row = self._header(
            kind, number, {"samples": samples, "microbatches": microbatches, "error": ""}
        )
        agreement = self._agree_on(row)
        self.first_microbatch = agreement.first
        self._look_at(agreement.samples)
        if kind not in (FORWARD, FORWARD_ALONE):
            self.exchange = self._new_exchange()
        if kind == TRAIN_STEP:
            self.keep_own_state()
        return agreement.changed

    def keep_own_state(self) -> None:
        """Let go of the optimizer's state that other processes keep."""
        owners, optimizer = self.owners, self._optimizer
        if owners is None or optimizer is None:
            return
        owners.assign(self._net.named_parameters())
        optimizer.forget(p for n, p in self._net.named_parameters() if not owners.is_mine(n))
        if self._hooked is not optimizer.full:
            self._hooked = optimizer.full
            optimizer.full.register_load_state_dict_post_hook(lambda _: self.values_were_set())
            optimizer.full.register_step_pre_hook(refuse_own_step)

    def average_gradients(self) -> Exchange:
        """Let ``grad`` be the average over all processes, of the parameters updated here.

        For steps that no schedule runs with its updates; gradients have all been made. All have
        still to agree on the updates.
        """
        exchange = self.exchange
        assert exchange is not None, "the step was announced"
        arrived: dict[str, Arrived] = {}
        for name, param in self._trained():
            gradient = param.grad
            stride = dense_stride(param.shape, param.stride())
            if gradient is None or gradient.stride() != stride:
                place = torch.empty_strided(tuple(param.shape), stride, dtype=param.dtype)
                if gradient is not None:
                    place.copy_(gradient)
            else:
                place = gradient.detach()
            arrived[name] = Arrived(place, gradient is not None)
        exchange.arrived(arrived)
        names = exchange.mine(exchange.average())
        for name, param in self._trained():
            held = arrived[name].place
            if name not in names:
                param.grad = None
            elif held is not None and (param.grad is None or not _same(param.grad, held)):
                param.grad = held
        return exchange

    def average_of(self, host: HostState) -> frozenset[str]:
        """Let the gradients of a backward on the host be the average over all processes.

        Returns:
            The parameters that have one in any process.
        """
        exchange = self.exchange
        assert exchange is not None, "the backward was announced"
        host.settle_all()
        exchange.arrived(host.gradients_of(host.gradients.layout.places))
        names = exchange.average()
        host.averaged(names)
        exchange.agree()
        return names

    # What is said before a step

    def _tell(self, number: int, error: BaseException) -> None:
        """Let the others hear of an error of this process, in whatever they wait for."""
        why = f"{type(error).__name__}: {text_of(error)}"
        wait = isinstance(error, Exception)  # not who wants to end: the others hear as they come
        if self.exchange is not None:
            self.exchange.fail(why, wait=wait)
            return
        if not self._announced:
            row = self._header("", number, {"samples": 0, "microbatches": 0, "error": why[:900]})
            job: Callable[[], object] = partial(self._agree, row)
        elif self._kind in (
            FORWARD,
            FORWARD_ALONE,
        ):  # the others wait for nothing of it, but for what comes next
            return
        else:
            job = partial(self._answer, why)
        try:
            if wait:
                self.group.run(job)
            else:
                self.group.submit(partial(_quietly, job), _nothing)
        except (PeerError, ConfigError):
            pass  # of all of them; this process says its own

    def _answer(self, why: str) -> None:
        """Fail in a step that was agreed on after all, though this process waits no more."""
        if self._agreement is None and self._said:
            self._finish()
        if self._agreement is not None:
            self._new_exchange().fail(why, wait=False)

    def _new_exchange(self) -> Exchange:
        trained = [(name, p.numel(), p.dtype) for name, p in reversed(list(self._trained()))]
        key, names = tuple(trained), [name for name, _, _ in trained]
        if self.owners is not None and self._kind == TRAIN_STEP:
            self.owners.assign(self._net.named_parameters())
            if self._owned[0] != key:
                self._owned = key, cut_by_owner(trained, self.owners.of, self.group.size)
            params, looks = dict(self._net.named_parameters()), bool(self._facts["looks"])
            return ShardedExchange(self.group, self._owned[1], names, self.owners, params, looks)
        if self._chunks[0] != key:
            self._chunks = key, cut(trained)
        return Exchange(self.group, self._chunks[1], names)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self._net.named_parameters() if p.requires_grad)

    def _header(self, kind: str, number: int, more: Mapping[str, Any]) -> torch.Tensor:
        said = {
            **self._facts,
            "kind": kind,
            "step": number,
            "model": self._form(),
            "optimizer": hash_of(options_of(self._optimizer)),
            "open": self._is_open,
            "buffers": bool(self._changed_buffers()),
            **more,
        }
        while len(data := json.dumps(said).encode()) > HEADER_NBYTES:
            said["error"] = said["error"][: len(said["error"]) // 2]
        return torch.tensor([*data.ljust(HEADER_NBYTES)], dtype=torch.uint8)

    def _form(self) -> str:
        """What the model is like; updates that are left need not be made for that."""
        with torch._C.DisableTorchFunctionSubclass():
            form = list(form_of(self._net))
            if self.owners is not None:
                self.owners.assign(self._net.named_parameters())
                form += sorted(self.owners.of.items())
            return hash_of(iter(form))

    def _changed_buffers(self) -> list[str]:
        """Buffers that were written to since all processes had the same."""
        now = {name: (id(b), version_of(b)) for name, b in self._net.named_buffers()}
        return [name for name, mark in now.items() if self._marks.get(name) != mark]

    def _agree_on(self, row: torch.Tensor) -> Agreement:
        """Compare what all processes say, and make values the same where somebody set some."""
        found = self.group.run(partial(self._agree, row))
        if found is None:  # a thread that reads parameters would wait for this one's updates
            self._flush()
            found = self.group.run(self._finish)
        return found

    def _agree(self, row: torch.Tensor) -> Agreement | None:
        """On the thread of the group: compare what all processes say; None if values, too."""
        self._said = []
        rows = self.group.gather(row)
        said = [json.loads(bytes(theirs.tolist())) for theirs in rows]
        for rank, theirs in enumerate(said):
            if theirs["error"]:
                raise PeerError(
                    f"process {rank} of {self.group.size} failed: {theirs['error']} [As process "
                    f"{self.group.rank} hears of it, whose parameters are all of one step]"
                )
        self._compare(said)
        self._said = said
        return None if any(theirs["open"] for theirs in said) else self._finish()

    def _finish(self) -> Agreement:
        """On the thread of the group: make values the same, as far as that is needed."""
        said, changed = self._said, False
        if any(theirs["open"] for theirs in said):
            changed = self._make_same()
        elif any(theirs["buffers"] for theirs in said):
            changed = self._share_buffers()
        self._is_open = False
        self._marks = {name: (id(b), version_of(b)) for name, b in self._net.named_buffers()}
        first = sum(theirs["microbatches"] for theirs in said[: self.group.rank])
        samples = tuple(theirs["samples"] for theirs in said)
        self._agreement = Agreement(first, changed, samples)
        return self._agreement

    def _compare(self, said: Sequence[Mapping[str, Any]]) -> None:
        """Refuse in all processes what is not the same in all.

        Raises:
            ConfigError: saying what, and in which process.
        """
        for key, meaning in _MEANING.items():
            for rank, theirs in enumerate(said):
                if theirs[key] != said[0][key]:
                    values = ""
                    if key in ("precision", "looks", "step", "kind"):
                        values = f" ({said[0][key]!r} and {theirs[key]!r})"
                    raise ConfigError(
                        f"processes 0 and {rank} of {self.group.size} differ in {meaning}{values}:"
                        " all have to train the same model in the same way, and to come to as "
                        "many steps (DistributedSampler, or a sampler that drops what is uneven). "
                        "Nothing was changed"
                    )

    def _make_same(self) -> bool:
        """Let parameters and buffers that are not process 0's become so."""
        tensors = {**dict(self._net.named_parameters()), **dict(self._net.named_buffers())}
        states = {} if self._optimizer is None else state_of(self._optimizer, self._net)
        own = [
            *state_digests(states, self._net, self.owners),
            *digests_of(list(tensors.values())).tolist(),
        ]
        rows = self.group.gather(torch.tensor(own, dtype=torch.int64).view(torch.uint8))
        found = rows.contiguous().view(torch.int64)
        values = found[:, len(own) - len(tensors) :]
        compare_states(found[:, : len(own) - len(tensors)], self._net, self.owners)
        different = (values != values[0]).any(0).tolist()
        taken = [t for t, d in zip(tensors.values(), different, strict=True) if d]
        about_to_change(t for t in taken if isinstance(t, nn.Parameter))
        take_from_first(self.group, taken)
        return any(different)

    def _share_buffers(self) -> bool:
        """Let buffers that a process has changed be process 0's, as DDP does."""
        buffers = dict(self._net.named_buffers())
        mine = set(self._changed_buffers())
        row = torch.tensor([name in mine for name in buffers], dtype=torch.uint8)
        changed = self.group.gather(row).any(0).tolist()
        take_from_first(
            self.group, [b for b, c in zip(buffers.values(), changed, strict=True) if c]
        )
        return True

    def _look_at(self, samples: tuple[int, ...]) -> None:
        """Say once that parts of a batch differ in size."""
        if len(set(samples)) > 1 and not self._warned and self.group.rank == 0:
            self._warned = True
            warn(
                f"the processes' parts of this batch have {', '.join(map(str, samples))} samples: "
                "gradients are averaged over processes, as by DistributedDataParallel, so samples "
                "of smaller parts count for more"
            )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are of the same memory."""
    return one.data_ptr() == other.data_ptr()


def _quietly(job: Callable[[], object]) -> None:
    """Run what nobody waits for any more."""
    try:
        job()
    except Exception:
        return


def _nothing() -> None:
    """Accept: nobody waits."""
