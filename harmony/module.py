"""`Harmony`: an `nn.Module` around yours whose training does not need to fit in GPU memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from harmony.checkpoint import Checkpoints, Restored, Saving
from harmony.core.arguments import named_arguments
from harmony.core.options import current_options
from harmony.core.timeline import Timeline
from harmony.engine.autograd import needs_graph
from harmony.engine.bypass import Bypass, within
from harmony.engine.engine import Engine
from harmony.engine.facade import ShownForward, Wrapper, check_module
from harmony.engine.options import (
    EngineOptions,
    check_loss,
    check_nonfinite,
    check_options,
    check_shards,
    check_types_of,
    pinned_plan,
    watch_of,
)
from harmony.engine.own_loop import OwnLoop
from harmony.engine.precision import precision_of
from harmony.engine.train_steps import TrainSteps
from harmony.engine.turns import in_turn
from harmony.errors import ConfigError
from harmony.planner.ir.plan import Plan
from harmony.report.session import ModelRecord, Observer, Verified
from harmony.report.text import print_report
from harmony.runtime.hardware import Devices, choose_devices, memory_limit
from harmony.runtime.peers.group import peers_of
from harmony.runtime.peers.owners import Owners
from harmony.runtime.processes import check_alone, host_memory_of, local_share
from harmony.runtime.step.randomness import drawn_seed
from harmony.runtime.update.optimizer import Groups, OptimizerFactory, check_optimizer_options
from harmony.verification.script import verify_and_stop
from harmony.verification.verification import Verification
from harmony.verification.verifier import verify


class Harmony(Wrapper):
    """Trains a module whose weights, gradients and optimizer state exceed the GPUs' memory.

    Step form: everything planned, parameters updated while the backward goes on::

        model = Harmony(net, optimizer=torch.optim.AdamW, optimizer_kwargs={"lr": 1e-4},
                        loss_fn=torch.nn.functional.cross_entropy)
        for inputs, targets in batches:
            loss = model.train_step(inputs, targets)

    Drop-in form: the loop stays yours::

        model = Harmony(net)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()

    Parameters stay on the host and keep their identity: an optimizer, a scheduler or a reference
    made before keeps working. What is computed is what plain PyTorch computes when it accumulates
    the gradients of the same microbatches (see `harmony.microbatch_seed` for random numbers).

    Args:
        module: the module, on the CPU (or on the meta device's way there); it is not copied.
        optimizer: a `torch.optim` class (or a function of the parameters) for `train_step`. If
            its step for all parameters is not its steps for some of them one by one, which is
            tried, it is one call of ``optimizer.step()`` on the host behind the backward.
        optimizer_kwargs: its options. In the default form of `torch.optim.Adam`, ``AdamW`` and
            ``SGD`` fp32 parameters are updated on the host by kernels of Harmony's own, with the
            same bits; they are compiled at first use, and without a C++ compiler the class's own
            loop runs. ``fused=True`` is PyTorch's fused form, which differs in last places.
        param_groups: groups of parameters with options of their own, as `torch.optim` takes them
            (``[{"params": [...], "weight_decay": 0.0}, ...]``), or a function of the module that
            returns them. They must hold every parameter that is not frozen. Without groups the
            optimizer has all parameters; it passes over frozen ones, which have no gradient.
        max_grad_norm: clip the norm of all gradients together, as `clip_grad_norm_` does before
            ``optimizer.step()``. No parameter can be updated before the whole backward is done
            then, so that updates no longer hide behind it.
        loss_fn: ``loss_fn(output, targets)``, a scalar; None if the module returns its own loss.
        mode: ``"pp"`` (packs of layers wrap around the GPUs), ``"dp"`` (each GPU runs all packs
            on its share of the batch), or ``"auto"``: whichever is predicted to be faster.
        microbatch_size: samples of a microbatch, which is a batch of its own wherever samples mix;
            or ``"auto"``: any size that gives what the whole batch would.
        devices: how many GPUs, or which; default: all. Without a GPU, virtual ones are made.
        device_memory: bytes to use of each GPU, e.g. ``"8GiB"``; default: all that is free.
        batch_dims: the dimension that counts samples, for inputs where it is not dimension 0, or
            None for inputs that have none but happen to have as many rows: by name, as in
            ``{"kwargs['mask']": None, "args[1]": 1, "targets": 0}``.
        plan: a `Plan`, or a file that holds one, to use instead of searching for one. It is
            refused if it is for another model, another first batch, or more memory than there is.
        activations: ``"auto"``: what the backward needs is kept on the GPU, offloaded to the host
            or recomputed, pack by pack, whichever is faster. ``"recompute"``: always recomputed.
        updates: ``"auto"``: packs whose weights can stay on a GPU are updated there, and their
            gradients never leave it. ``"host"``: every update runs on the CPU, and after each step
            ``param.grad`` holds the gradient of every parameter.
        overlap_updates: whether a step may leave updates to the next one, which makes each just
            before the forward of its pack, behind the forwards in front of it; with
            ``max_grad_norm`` that is where all of them can hide. Results are the same bits. Who
            reads or writes a parameter, its gradient or the optimizer before that waits until they
            are made, so nothing is ever stale; `synchronize` makes them too. While somebody holds
            memory of a parameter (``.detach()``, an array, a state dict) each step makes its own.
            Unseen are constructors that take a parameter itself as data (``torch.tensor(p)``,
            ``as_tensor``, ``asarray``, ``Tensor``, ``new_tensor``), and ``to_dlpack(p)``, as
            PyTorch tells no class of these: give them ``p.detach()``, or `synchronize` before.
        replan: whether the plan may change between two steps, once the steps have shown what they
            take and another plan is predicted to be more than 5 % faster with that. It computes
            the same, bit for bit: microbatches and replicas stay what they are. Likewise a step
            for which others have taken device memory is planned again and repeated; without, or
            with ``plan``, it is an error that has changed nothing.
        precision: ``"fp32"``: the model computes in the types that its parameters have.
            ``"bf16"``: it computes with copies of parameters and inputs in bf16, which are what
            streams; gradients of the microbatches add up in fp32, and the optimizer updates the
            fp32 parameters, which stay on the host (see `harmony.engine.precision`). ``"fp16"``:
            the same in fp16, and `train_step` scales the loss by `grad_scaler`; a loop of your own
            brings a `torch.amp.GradScaler`, as with FSDP2.
        seed: the run's seed, for `harmony.microbatch_seed`; None: one that follows from torch's
            generator now, so that `torch.manual_seed` before makes runs repeatable.
        detect_nonfinite: raise `harmony.NonFiniteError` when a loss or a gradient is infinite or
            NaN, before anything is updated, and name the operation, its line, the layer and the
            samples that it comes from. In `train_step` updates wait for the whole backward then,
            and run on the host; in a loop of your own ``backward()`` raises, and adds no gradient
            to any. All gradients are read once more; only a step in which something is found runs
            a second time, to find out where.
        watchdog: seconds (or ``"10m"``) after which a step in which nothing has moved is reported:
            at which instruction every thread and stream is, and the schedule's lines around it.
            Then it goes on waiting or, with ``"10m,end"``, the process ends with exit code 124.
            None: what the variable ``HARMONY_WATCHDOG`` says; without it nothing is watched. It
            has to be longer than the longest instruction, as an update of a large pack.
        process_group: the processes that train this model together, one a server, e.g.
            ``torch.distributed.group.WORLD``; each gives its own part of every batch. Gradients
            are added in the order of the ranks and divided by the number of processes, behind
            the backward, and every process takes the same step. All have to make the model, and
            then to make the same calls. Under `torchrun` with several processes on a server each
            has its share of the GPUs. See docs/servers.md.
        shard_optimizer_state: whether each process of the group keeps the optimizer's state of
            some parameters only, about an equal part of the bytes, updates these, and gets the
            others from the processes that update them (ZeRO's first stage). Results and traffic
            are the same. `optimizer.state_dict` then holds this process's part, a checkpoint all
            of it. Not with ``overlap_updates``, nor with optimizers whose step is one of all
            parameters.

    Raises:
        ConfigError: for an option that makes no sense, or in one of several processes without
            ``process_group``.
        PlanError: if the file of a plan cannot be read.
    """

    _train_steps: TrainSteps
    _own_loop: OwnLoop
    _checkpoints: Checkpoints

    @named_arguments
    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: OptimizerFactory | None = None,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        param_groups: Groups | Callable[[nn.Module], Groups] | None = None,
        max_grad_norm: float | None = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        mode: str = "auto",
        microbatch_size: int | str = "auto",
        devices: Devices = None,
        device_memory: str | int | None = None,
        batch_dims: Mapping[str, int | None] | None = None,
        plan: Plan | str | Path | None = None,
        activations: str = "auto",
        updates: str = "auto",
        overlap_updates: bool = False,
        replan: bool = True,
        precision: str = "fp32",
        seed: int | None = None,
        detect_nonfinite: bool = False,
        watchdog: float | str | None = None,
        process_group: Any = None,
        shard_optimizer_state: bool = False,
    ) -> None:
        super().__init__()
        if process_group is None:
            check_alone()
        check_module(module)
        check_options(mode, microbatch_size, activations, updates)
        check_types_of(optimizer_kwargs, batch_dims, seed)
        check_loss(loss_fn)
        check_optimizer_options(optimizer, optimizer_kwargs, param_groups, max_grad_norm)
        options = current_options()
        check_nonfinite(detect_nonfinite, options.precision or precision)
        overlap_updates = overlap_updates or options.overlap_updates
        check_shards(shard_optimizer_state, process_group, optimizer, overlap_updates)
        share = local_share(process_group)
        chosen = choose_devices(devices, device_memory, share)
        peers = peers_of(process_group)
        seed = drawn_seed() if seed is None else seed
        self._begin(
            module,
            chosen,
            EngineOptions(
                optimizer=optimizer,
                optimizer_kwargs=dict(optimizer_kwargs or {}),
                param_groups=param_groups,
                max_grad_norm=max_grad_norm,
                loss_fn=loss_fn,
                mode=mode if options.mode == "auto" else options.mode,
                microbatch_size=None if isinstance(microbatch_size, str) else microbatch_size,
                device_memory_nbytes=memory_limit(device_memory),
                host_memory_nbytes=host_memory_of(options.host_memory_nbytes, share),
                batch_dims=dict(batch_dims or {}),
                plan=pinned_plan(plan),
                activations=activations,
                updates=updates,
                overlap_updates=overlap_updates,
                replan=replan and options.replan,
                precision=precision_of(options.precision or precision),
                seed=seed if peers is None else peers.same_number(seed),
                watch=watch_of(watchdog),
                detect_nonfinite=detect_nonfinite,
                peers=peers,
                owners=Owners(peers.rank, peers.size)
                if peers is not None and shard_optimizer_state
                else None,
            ),
        )
        if options.verify:
            self._refuse_with_peers("--verify", "run the script in one process for that")
        if options.verify and optimizer is None:
            verify_and_stop(self._engine)

    def _begin(
        self, module: nn.Module, devices: Sequence[torch.device], options: EngineOptions
    ) -> None:
        engine = Engine(module, devices, options)
        self._show(module)
        self.__dict__["_engine"] = engine
        self.__dict__["_train_steps"] = TrainSteps(engine)
        self.__dict__["_own_loop"] = OwnLoop(engine)
        self.__dict__["_checkpoints"] = Checkpoints(engine)
        self.__dict__["_bypass"] = Bypass(
            module,
            updates_itself=options.optimizer is not None,
            casts=options.precision.dtype is not None,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Harmony:
        """Return a model of its own: a copy of the module, its optimizer's state and the options.

        It has threads and device memory of its own from its first batch on.
        """
        engine = self._engine
        engine.whole.check()
        engine.late.flush()
        copied = type(self).__new__(type(self))
        nn.Module.__init__(copied)
        memo[id(self)] = copied
        net = copy.deepcopy(self._net, memo)
        options = replace(
            engine.options,
            optimizer_kwargs=copy.deepcopy(engine.options.optimizer_kwargs, memo),
            param_groups=copy.deepcopy(engine.options.param_groups, memo),
            loss_fn=copy.deepcopy(engine.options.loss_fn, memo),
        )
        copied._begin(net, engine.devices, options)
        copied.num_steps = self.num_steps
        if self.optimizer is not None and copied.optimizer is not None:
            copied.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        if self.grad_scaler is not None and copied.grad_scaler is not None:
            copied.grad_scaler.load_state_dict(self.grad_scaler.state_dict())
        return copied

    # Training

    @_disable_dynamo
    @named_arguments
    def train_step(self, inputs: Any, targets: Any = None) -> torch.Tensor:
        """Train on one minibatch: forward, loss, backward and update, planned as a whole.

        Args:
            inputs: what the module takes: a tensor, a tuple of positional arguments, or a
                dictionary of keyword arguments; samples along dimension 0.
            targets: what ``loss_fn`` takes beside the output; None if the module returns its loss.

        Returns:
            The loss of the whole batch, a scalar on the CPU.

        Raises:
            ConfigError: without an optimizer, or if the batch makes no sense.
            ExecutionError: if a task fails; says which, and what became of the parameters.
            PeerError: if another process of the group has failed, or is gone.
        """
        engine = self._engine
        self._bypass.watch(engine.factory.generation)
        if engine.peers is not None and not self._own_loop.syncs:
            raise ConfigError(
                "train_step in model.no_sync(): it averages the gradients of its whole batch and "
                "takes a step. Give it a larger batch instead, or accumulate in a loop of your own"
            )
        if engine.options.optimizer is None:
            raise ConfigError(
                "train_step needs an optimizer: Harmony(module, optimizer=torch.optim.AdamW). "
                "To keep your own loop, call the model, loss.backward() and your optimizer"
            )
        if current_options().verify:
            raise Verified(self.verify(inputs, targets))
        self._check_run()
        args, kwargs = _arguments(inputs)
        return self._train_steps.train_step(args, kwargs, targets).loss

    @ShownForward
    @_disable_dynamo  # in a compiled function, or as torch.compile(model), it just runs
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module: its outputs for the whole batch, with gradients where enabled."""
        self._bypass.watch(self._engine.factory.generation)
        if torch.is_grad_enabled() and needs_graph(self._net, (args, kwargs)):
            self._check_run()
            return self._own_loop.forward(args, kwargs)
        # What a first call makes, the arena above all, has to outlive an inference_mode around it.
        with torch.inference_mode(False), torch.no_grad():
            return self._own_loop.infer(args, kwargs)

    def _check_run(self) -> None:
        """Refuse to train from the start where the command line asks to go on, or in parts.

        A checkpoint that could not be written since the last step is told of, too.

        Raises:
            ConfigError: if no `harmony.Run` has looked for a checkpoint of this model, or this is
                one of several processes and the model has no ``process_group``.
        """
        if (saving := self._checkpoints.last) is not None:
            saving.tell()
        if self._engine.peers is None:
            check_alone()
        wanted = current_options().resume
        if wanted is not None and not self.record.resumed:
            raise ConfigError(
                f"--resume {wanted}: the script trains {self.record.name} without having resumed "
                "it. Add run = harmony.Run(model, ...) and run.resume() before the first step"
            )

    def _refuse_with_peers(self, what: str, remedy: str) -> None:
        """Refuse what several processes cannot do together.

        Raises:
            ConfigError: naming it, and what to do.
        """
        if self._engine.peers is not None:
            raise ConfigError(
                f"{what} in one of several processes (process_group=): {remedy}. Nothing has run"
            )

    def _weights_loaded(self) -> None:
        """Hear that the module's values were read from a file."""
        self._engine.restored()

    def verify(self, inputs: Any, targets: Any = None) -> Verification:
        """Run one step on this batch by Harmony and by plain PyTorch, and compare them.

        Plain PyTorch runs the module itself, on the host, with its hooks and ``loss_fn``, on the
        whole batch at once (in microbatches only where ``microbatch_size=`` fixes them), and the
        optimizer's own ``step()``. Compared are the loss, every gradient, every buffer that
        changes, tensors and plain values on modules' attributes, and with `train_step` every
        parameter and all state of the optimizer after the step. Nothing of the model, its
        optimizer or the random states changes; what hooks and forwards do outside of the module
        happens once more for each run.

        Args:
            inputs: as for `train_step`.
            targets: as for `train_step`. A loop of one's own needs a loss as well: ``loss_fn`` and
                targets, or a module that returns its loss.

        Returns:
            The differences; ``.ok`` says whether all are within the tolerance (in single
            precision 1e-5 of a parameter's largest gradient, or of its largest change in the
            step, 1e-4 for gradients where Harmony chose several microbatches), ``.summary()`` is
            one line, ``.notes`` says what could not be compared.

        Raises:
            ConfigError: if there is no loss.
            DoesNotFitError: if the host has no memory for the second run, with the bytes.
        """
        self._engine.whole.check()
        self._refuse_with_peers(
            "a comparison with plain PyTorch", "verify the model without process_group= first"
        )
        self._engine.late.flush()
        args, kwargs = _arguments(inputs)
        with in_turn(), within(self._net):
            return verify(self._engine, args, kwargs, targets)

    # Checkpoints

    def save_checkpoint(
        self,
        folder: str | Path,
        *,
        keep: int | None = None,
        extra: Any = None,
        async_save: bool = False,
        **objects: Any,
    ) -> Path:
        """Write all that this run needs to go on bit for bit, as ``folder/step-N``.

        With a ``process_group`` every process calls it; process 0 writes, and it holds the random
        states, ``objects`` and ``extra`` of each.

        That is: parameters (frozen or not) and buffers, the optimizer of `train_step`,
        `num_steps`, `seed`, Python attributes of modules that have changed since, and the random
        states of torch, Python and NumPy. The folder of a checkpoint holds ``model.safetensors``,
        named as the module's own ``state_dict()``; of a Hugging Face model also ``config.json``,
        ``generation_config.json`` and the files of its tokenizer (``module.tokenizer``, or one
        that is given by name), so that ``from_pretrained`` reads it. Tied weights are stored
        once. No second copy of the model is made. In a loop of your own gradients that are there
        are saved too, as the next ``optimizer.step()`` may use them; after
        ``optimizer.zero_grad()`` there are none.

        Args:
            folder: where checkpoints are; made if it is not there.
            keep: remove all but so many of the newest up to this one afterwards; None keeps all.
            extra: numbers, texts, tensors, and lists and dictionaries of these, for the script.
            async_save: return once what has no part in an update is written, and let a thread
                write parameters and optimizer states while training goes on. Each pack keeps its
                values until they are read: its next update waits, or works on while they are
                copied, as long as there are at most two packs of copies. The files are the same,
                byte for byte. One save at a time: the next waits for it. If it fails the next
                step warns, and `finish_saving` raises.
            objects: what else has ``state_dict()`` and ``load_state_dict()``: an optimizer of
                one's own (stored by the names of parameters), LR schedulers, gradient scalers,
                data loaders that know their position. Tokenizers and processors (what has
                ``save_pretrained()`` and no state) have their files written, and are not loaded.

        Returns:
            The folder of this checkpoint; with ``async_save`` it is not there yet.

        Raises:
            ConfigError: if something cannot be saved.
            NotSavedError: if the disk is full or cannot be written to. What was saved before is
                whole.
            HarmonyError: if the model is torn, or a GPU with optimizer state on it fails.
        """
        return self._checkpoints.save(Path(folder), keep, extra, async_save, objects)

    def largest_of(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest of each of these numbers in any process that trains this model.

        All of them have to call it, as `harmony.Run` does to find out whether one of them is to
        save or to end. Without ``process_group`` they are returned as they are.
        """
        engine = self._engine
        if engine.peers is None:
            return list(numbers)
        return engine.peers.largest_of(numbers, engine.num_steps)

    def finish_saving(self) -> None:
        """Wait until the checkpoint of ``save_checkpoint(..., async_save=True)`` is written.

        Raises:
            NotSavedError: if it could not be. What was saved before is whole.
        """
        self._checkpoints.finish()

    @property
    def saving(self) -> Saving | None:
        """The last checkpoint that was to be written while training goes on."""
        return self._checkpoints.last

    def load_checkpoint(
        self, folder: str | Path, *, skip_damaged: bool = False, **objects: Any
    ) -> Restored:
        """Bring the run back to where `save_checkpoint` was called.

        Every file is read and compared with its checksum before anything changes. Training goes
        on as if it had not been interrupted, to the last bit: batches are parted as before where
        nothing else was asked for, and it fits; else a warning says so.

        Args:
            folder: where checkpoints are, of which the newest is taken, or one of them.
            skip_damaged: take the newest that is whole, and warn of those that are not.
            objects: the same, by the same names, as `save_checkpoint` was given.

        Returns:
            The step, the folder, and ``extra``.

        Raises:
            ConfigError: if there is none, or it is damaged, of another model, optimizer or
                version, or holds other objects. The model is as it was; only if weights were
                whole when they were compared and are not when they are read to their place, it
                refuses to go on until a state is loaded.
            DoesNotFitError: if the host has no memory for the optimizer's state.
        """
        return self._checkpoints.load(Path(folder), objects, skip_damaged)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up in this process, without an average, as `DistributedDataParallel`.

        In a loop of your own with a ``process_group``: a backward whose forward was in the block
        adds the gradients of this process to ``param.grad``. The next backward of a forward that
        was not averages what all have added up until then, once autograd has added its own::

            for inputs, targets in parts[:-1]:
                with model.no_sync():
                    loss_fn(model(inputs), targets).backward()
            loss_fn(model(inputs), targets).backward()  # of the last part

        All processes enter it together. Without ``process_group`` it does nothing.
        """
        with self._own_loop.no_sync():
            yield

    def synchronize(self) -> None:
        """Make the updates that the last step has left to the next one (`overlap_updates`)."""
        self._engine.late.flush()

    def close(self) -> None:
        """Give back all threads, GPU memory and pinned memory of the model, at once.

        The module (``model.module``) keeps its values and is an ordinary one again; its parameters
        are on the host. Training and calling this wrapper are errors from now on. ``del model``
        does the same as soon as nothing else holds the model.

        Raises:
            NotSavedError: if a checkpoint that was still to be written could not be.
        """
        try:
            self.finish_saving()
        finally:
            self._engine.close()
            self._bypass.is_over = True

    def __enter__(self) -> Harmony:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_observer(self, observer: Observer) -> None:
        """Let ``observer`` hear of every plan and step of this model.

        Raises:
            ConfigError: if it is no `harmony.Observer`.
        """
        if not isinstance(observer, Observer):
            raise ConfigError(f"an observer is a harmony.Observer, not {type(observer).__name__}")
        self.record.observers.append(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Let ``observer`` hear no more; nothing happens if it did not."""
        with contextlib.suppress(ValueError):
            self.record.observers.remove(observer)

    # What is to be seen of it

    @property
    def module(self) -> nn.Module:
        """The module itself; its parameters live in the host arena once training has begun."""
        return self._net

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of `train_step`, for LR schedulers and checkpoints."""
        return self._engine.optimizer

    @property
    def last_grad_norm(self) -> torch.Tensor | None:
        """Norm of all gradients of the last step before clipping; None without max_grad_norm."""
        return self._engine.last_grad_norm

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss of `train_step` with ``precision="fp16"``; else None.

        It is PyTorch's: `get_scale`, and what is to be otherwise by its own methods, as
        `set_growth_interval` or ``update(1024.0)``. A step whose gradients are not finite updates
        nothing. Checkpoints hold its state.
        """
        return self._engine.grad_scaler

    @property
    def num_steps(self) -> int:
        """Steps trained so far; set it when resuming, since random numbers depend on it."""
        return self._engine.num_steps

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        self._engine.num_steps = value

    @property
    def seed(self) -> int:
        """The run's seed: give it to a model that is to go on with the same random numbers."""
        return self._engine.options.seed

    @property
    def plan(self) -> Plan | None:
        """The plan in use; None before the first batch."""
        return self.record.plan

    @property
    def capture_mode(self) -> str:
        """How the module is captured, at worst.

        ``"trace"``: one forward with fake parameters; ``"real-run trace"``: one forward with the
        real ones; ``"dynamic"``: each microbatch is traced as it runs; ``"eager"``: the module's
        own Python runs once for each microbatch, on the first GPU and without a plan.
        """
        return self._engine.variants.capture_mode()

    @property
    def record(self) -> ModelRecord:
        """What the report is made of."""
        return self._engine.record

    @property
    def last_timeline(self) -> Timeline | None:
        """What ran when in the last step."""
        return self._engine.last_timeline

    def report(self) -> None:
        """Print the profiler report of the training so far."""
        print_report([self.record])


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(inputs), {}
    return (inputs,), {}
