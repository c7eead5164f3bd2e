"""The engine behind the wrapper: what one model has, and what runs for a call of it.

A *variant* is what one kind of call leads to: captured layers, measured costs, plans,
an executor. The parameters' arena is one for all variants. The calls themselves are in
`harmony.engine.train_steps` and `harmony.engine.own_loop`.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from harmony.capture import DynamicOnlyError, GuardError
from harmony.capture.graph.saved_hooks import hooks_aside
from harmony.core.timeline import Timeline
from harmony.core.units import format_bytes
from harmony.core.warn import warn
from harmony.engine.autograd import ForwardObserver
from harmony.engine.call_key import Call, CallKind
from harmony.engine.dynamic import DynamicRunner
from harmony.engine.eager import EagerRunner
from harmony.engine.generate import generate
from harmony.engine.grad_alias import AliasedGradients
from harmony.engine.late import Late
from harmony.engine.options import EngineOptions
from harmony.engine.peers import Peers
from harmony.engine.replan import MOST_SHRINKS, Feedback, shrunk
from harmony.engine.resumed import BitChoices
from harmony.engine.step_result import ReadyStep
from harmony.engine.variant_factory import VariantFactory
from harmony.engine.variants import OTHER_WAY, VariantCache
from harmony.engine.wholeness import Wholeness, alone
from harmony.errors import DoesNotFitError, ExecutionError, text_of
from harmony.planner.ir.tasks import TaskKind
from harmony.report import header as facts
from harmony.report import session
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.out_of_memory import is_undone, with_room
from harmony.runtime.interrupts import held_back
from harmony.runtime.step.layer_state import LayerStates
from harmony.runtime.step.randomness import RandomStreams, microbatch_seed
from harmony.runtime.step.recompute import ReplayState
from harmony.runtime.traced_lock import TracedLock
from harmony.runtime.update.loss_scaling import LossScaling

R = TypeVar("R")


class Engine:
    """Captures, plans and runs; one a model.

    Attributes:
        num_steps: training steps done, which random numbers depend on.
        resumed: how batches were parted before the checkpoint that was loaded, until it is known
            whether they still are.
        net: the module.
        devices: the GPUs.
        record: what the report is made of.
        whole: whether it can go on.
        late: updates that the last step has left to the next one.
        lock: who runs it now.
        verifier: sees every forward and backward of an own loop, where one is set.
        optimizer: the full optimizer of `train_step`, once training has begun or asked for.
        dynamic, eager: run what no trace stands for.
        feedback: plans again by what steps have taken; None where the plan is to stay.
        aliased: gradients that autograd has been handed; None before the first.
        peers: the other processes that train this model; None where there are none.
    """

    def __init__(
        self, net: nn.Module, devices: Sequence[torch.device], options: EngineOptions
    ) -> None:
        self.options = options
        self.num_steps = 0
        self.resumed: BitChoices | None = None
        self.verifier: ForwardObserver | None = None
        self.last_timeline: Timeline | None = None
        self.net = net
        self.devices = list(devices)
        self._contexts = [DeviceContext(device) for device in devices]
        self.aliased: AliasedGradients | None = None
        self.lock = TracedLock()
        self._optimizer = options.make_optimizer(net)
        self.whole = Wholeness(net, self._optimizer)
        self.late = Late(self.whole, self.lock, self._optimizer)
        self.record = session.register(
            type(net).__name__, facts.of_model(net, self._contexts, self._optimizer)
        )
        if options.optimizer is None and (notice := facts.sparse_notice(net)) is not None:
            self.record.warn(notice)
            warn(notice)
        watched = options.replan and options.plan is None
        self.feedback = Feedback(self.record, options.activations) if watched else None
        self.factory = VariantFactory(net, self._contexts, options, self._optimizer, self.record)
        self.variants = VariantCache(net, self._contexts, options, self.factory, self.record)
        self.variants.before_others = self.late.flush
        self.dynamic = DynamicRunner(
            net,
            self._contexts[0],
            options,
            self.factory,
            self.variants,
            self._optimizer,
            self.record,
        )
        self.peers: Peers | None = None
        if options.peers is not None:
            same = {"precision": options.precision.name, "looks": options.detect_nonfinite}
            self.peers = Peers(
                options.peers, net, self._optimizer, same, self.late.flush, options.owners
            )
        self.eager = EagerRunner(net, self._contexts[0], options, self.variants, self.dynamic.say)
        self.dynamic.peers = self.eager.peers = self.peers

    def __del__(self) -> None:
        # A `weakref.finalize` would keep the module, and so whatever the module's code can see.
        if "late" in self.__dict__:
            self.late.give_up()

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The full optimizer, for LR schedulers and checkpoints."""
        if self._optimizer is None:
            return None
        self.factory.settle_optimizer()
        return self._optimizer.full

    @property
    def last_grad_norm(self) -> torch.Tensor | None:
        """Norm of all gradients of the last step, before they were clipped."""
        norm = None if self._optimizer is None else self._optimizer.last_norm
        return None if norm is None else norm.clone()  # updates that are left still want it

    @property
    def scaling(self) -> LossScaling | None:
        """What scales the loss of `train_step`; None where nothing does."""
        return None if self._optimizer is None else self._optimizer.scaling

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """PyTorch's object for that."""
        return None if self.scaling is None else self.scaling.scaler

    @property
    def dynamic_size(self) -> int | None:
        """Samples of a microbatch of a dynamic step; None before there was one."""
        return self.dynamic.size

    # Calls

    def _prepare(self, kind: CallKind, call: Call) -> ReadyStep:
        """Do what `ready` does; Ctrl-C is heard in it, as nothing has changed."""
        with held_back() as held, held.open():
            ready = self.ready(kind, *call)
        if self.resumed is not None and ready.planned.plan.minibatch == self.resumed.minibatch:
            self.resumed.compare(ready.planned.plan, ready.planned.graph)
            self.resumed = None
        return ready

    def in_room(
        self,
        kind: CallKind,
        call: Call,
        run: Callable[[ReadyStep], R],
        begun: Sequence[str] = (),
    ) -> tuple[ReadyStep, R]:
        """Run a planned call; again by a smaller plan if others have taken device memory.

        That is where nothing has changed yet: what is repeated begins from the same state, and
        computes the same.
        """
        for attempt in range(MOST_SHRINKS + 1):
            with hooks_aside() if kind is CallKind.OWN_LOOP else nullcontext():
                ready = self._prepare(kind, call)
            try:
                return ready, run(ready)
            except (ExecutionError, DoesNotFitError) as error:
                # Other processes have taken part in what would be repeated.
                may = self.feedback is not None and self.peers is None
                may = may and not self.factory.hooked()
                if attempt == MOST_SHRINKS or not (may and is_undone(error, begun)):
                    raise
                why = text_of(error.__cause__ or error)
            self._shrink(ready, why, attempt)  # only here its frames hold no device memory
        raise AssertionError("it has returned, or raised")

    def _shrink(self, ready: ReadyStep, why: str, attempt: int) -> None:
        """Go on with a plan for the device memory that there is now."""
        self.variants.activate(None)
        gc.collect()
        torch.accelerator.empty_cache()
        options, before = self.options, ready.planned
        limit = options.device_memory_nbytes
        planned = shrunk(before, self._contexts, limit, options.activations, attempt)
        ready.variant.learn(planned)
        nbytes = min(device.memory_nbytes for device in planned.measured.machine.devices)
        said = (
            f"step {self.num_steps} ran out of device memory ({why}). Nothing had changed: it is "
            f"planned again for {format_bytes(nbytes)} of each GPU, and repeated"
        )
        self.record.facts["plan changed"] = said
        warn(said)

    def goes_dynamic(
        self, kind: CallKind, call: Call, reason: DynamicOnlyError | GuardError
    ) -> DynamicOnlyError:
        """Note that no trace stands for the calls of this signature; return why.

        A decision by computed values shows only when the layers run; the forward of all layers
        comes before the first update, so nothing has changed then. Where an error in the forward
        led to it, the caller says so once the module has run as it is: it may end with that error.
        """
        known = isinstance(reason, DynamicOnlyError)
        found = reason if known else DynamicOnlyError(OTHER_WAY, reason.where)
        assert isinstance(found, DynamicOnlyError)
        if found.eager:
            self.options.precision.refuse(f"{found.reason} ({found.where})")
        paths, _ = self.variants.paths(kind, call)
        if not found.passing:
            paths.dynamic = found.again()
        if not (found.eager and found.passing):  # else it may be the caller's own error
            self.dynamic.notice(found)
        return found

    def ready(
        self, kind: CallKind, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any
    ) -> ReadyStep:
        """Capture, measure and plan for a batch, as far as that was not done before."""
        args, kwargs = self.options.precision.cast((args, kwargs))
        call = (args, kwargs, targets)
        find = functools.partial(self.variants.ready, kind, call)
        try:
            return with_room("measuring the model", self.devices, find)
        except DynamicOnlyError as reason:
            together = self.peers is not None and torch.is_grad_enabled()
            if kind is CallKind.TRAIN_STEP or reason.eager or together:
                raise
            self.dynamic.notice(reason)
            self.runs_whole(call)
            return self.dynamic.ready(kind, call, self.num_steps, 0)

    def runs_whole(self, call: Call) -> None:
        """Say that a loop of the caller's own runs a batch whole where no trace stands for it."""
        asked = self.options.microbatch_size
        if asked is None or not torch.is_grad_enabled():
            return
        minibatch = self.variants.paths(CallKind.OWN_LOOP, call)[1].num_samples
        if asked < minibatch:
            self.dynamic.say(
                f"microbatch_size={asked} does not part the batches of this loop: the forward is "
                f"known only as it runs, so each runs whole ({minibatch} samples in this one). "
                "Where samples mix (BatchNorm in training) that is another training: give the "
                f"model batches of {asked}, or use train_step, which parts them"
            )

    @alone
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run Hugging Face's ``generate`` of the module, its forwards on the first GPU."""
        self.whole.check()
        self.late.flush()
        self.variants.activate(None)  # the forwards need the memory
        return generate(self.net, self.devices[0], self.options.precision, args, kwargs)

    # State

    @alone
    def close(self) -> None:
        """Give back threads, device memory and the arena; the module keeps all values."""
        self.late.flush()
        self.whole.closed = True
        if self.peers is not None:
            self.peers.group.close()
        self.aliased = None
        self.verifier = None
        self.dynamic.forget()
        self.variants.forget()
        self.factory.arenas = None

    def bit_choices(self) -> BitChoices | None:
        """What of the last plan decides bits, for a checkpoint; None before the first step."""
        plan, graph = self.record.plan, self.record.graph
        return self.resumed if plan is None or graph is None else BitChoices.of(plan, graph)

    def two_packs_nbytes(self, nbytes: Mapping[str, int]) -> int:
        """Bytes of the two largest packs, where these are the bytes of each parameter."""
        plan, active = self.record.plan, self.variants.active
        if plan is None or active is None:
            return 0
        updated = map(active.host.updated_by, plan.spec.backward_packs)
        sizes = sorted(sum(nbytes.get(name, 0) for name in names) for names in updated)
        return sum(sizes[-2:])

    def restored(self, missing: Collection[str] = ()) -> None:
        """Note that a state was loaded, without the tensors named ``missing``."""
        if self.peers is not None:
            self.peers.values_were_set()
        if self.whole.restored(missing):
            self.variants.activate(None)  # what stays on devices may be of the step that failed

    def replay_state(self, ready: ReadyStep, recomputed: bool = True) -> ReplayState:
        """Start the random stream of every microbatch of a step, and what layers change.

        Args:
            recomputed: whether a backward will run the layers again.
        """
        captured, planned = ready.variant.captured, ready.planned
        end, minibatch = planned.forward_end, planned.plan.minibatch
        states = LayerStates(self.net, captured.changes, end, minibatch, recomputed)
        starts = planned.random_starts
        random = RandomStreams(starts, bool(starts) and captured.draws_on_host)
        if starts:
            first = 0 if self.peers is None else self.peers.first_microbatch
            kind = TaskKind.FORWARD if planned.plan.spec.forward_packs else TaskKind.BACKWARD
            for index, samples in enumerate(planned.in_order[kind], first + ready.first_index):
                seed = microbatch_seed(self.num_steps, index, self.options.seed)
                random.start(samples, 0, self._contexts[0].seeded_state(seed), seed)
        return ReplayState(random, states)
