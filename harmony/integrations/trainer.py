"""Hugging Face's Trainer, which gives Harmony the batches that it accumulates all at once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments

from harmony.errors import ConfigError
from harmony.integrations.joining import joined
from harmony.module import Harmony


class HarmonyTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """Trainer whose gradient accumulation streams the weights once a step.

    Trainer runs the forward and backward of one batch after the other, and each streams all
    weights. Here those of a step are one minibatch, of which each is a microbatch: the gradients
    are the same, bit for bit but for random numbers, which follow the microbatch (see
    `harmony.microbatch_seed`). Callbacks, schedulers, clipping, saves and resumed runs are
    Trainer's own.

    Batches are run one by one, as Trainer does, where they differ in shape, where they do not
    consist of tensors, or where the loss is not scaled by ``num_items_in_batch``.

    ``bf16=True`` trains a module that is not wrapped yet by ``precision="bf16"``, whose weights
    are half as many bytes on the links, and not under autocast, which casts them on the GPU. A
    Harmony model has a precision of its own and runs under autocast, as with Trainer.

    Under ``torchrun`` the processes train one model: each takes its part of the data, Harmony
    averages the gradients, and process 0 logs and saves.

    Args:
        model: the module, or a Harmony model.
        args: as for `transformers.Trainer`, and so are all others by name.
        harmony_options: options of `Harmony` for a module that is not wrapped yet;
            ``microbatch_size`` is the batch size unless it is given.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        harmony_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        args = TrainingArguments("trainer_output") if args is None else args
        size = args.per_device_train_batch_size
        self._harmony_options = {"microbatch_size": size, **(harmony_options or {})}
        if args.world_size > 1:
            _check_averages(args)
            self._harmony_options.setdefault("process_group", dist.group.WORLD)
        if args.bf16 and not isinstance(model, Harmony):
            self._harmony_options.setdefault("precision", "bf16")
            args = copy.copy(args)
            args.mixed_precision = "no"  # the flag stays for whoever reads it
        self._joined: dict[str, torch.Tensor] | None = None
        self._num_waiting = 0
        model = None if model is None else self._wrapped(model)
        super().__init__(model, args, *others, **options)

    def _wrapped(self, model: nn.Module) -> Harmony:
        return model if isinstance(model, Harmony) else Harmony(model, **self._harmony_options)

    def call_model_init(self, trial: Any = None) -> Harmony:
        """Make a model by ``model_init``, and wrap it."""
        return self._wrapped(super().call_model_init(trial))

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, which wraps no model in `DistributedDataParallel`."""
        super().create_accelerator_and_postprocess()
        prepare = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.prepare_model = prepare

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Take the batches of a step, which are to be run as one."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        is_scaled = num_items is not None and self.loss_is_scaled_for_ga is not False
        whole = joined(batches) if is_scaled else None
        self._joined = whole if self._all_of(whole is not None) else None
        self._num_waiting = len(batches)
        return batches, num_items

    def _all_of(self, here: bool) -> bool:
        """Whether something is so in every process: all run the same forwards."""
        if self.args.world_size == 1:
            return here
        said = torch.tensor([here], device=self.args.device)
        return bool(self.accelerator.gather(said).all())

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run all batches of a step in the place of the last; the loss of the others is 0."""
        if self._joined is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._num_waiting -= 1
        if self._num_waiting > 0:
            return torch.zeros((), device=self.args.device)
        whole, self._joined = self._joined, None
        return super().training_step(model, whole, num_items_in_batch)


def _check_averages(args: TrainingArguments) -> None:
    """Refuse what would wrap the model, and average its gradients once more.

    Raises:
        ConfigError: naming it, and what to do.
    """
    if args.deepspeed or args.fsdp:
        name = "deepspeed" if args.deepspeed else "fsdp"
        raise ConfigError(
            f"TrainingArguments({name}=...) with HarmonyTrainer: Harmony streams the model and "
            "averages the gradients itself. Leave it out"
        )
