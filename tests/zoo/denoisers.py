"""U-Nets of the diffusers library, for who has it installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo.data import classes, normal, square_loss
from tests.zoo.entry import LAYOUT, Entry


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        dropout=0.1,
    )


def conditional_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=12,
        in_channels=3,
        out_channels=3,
        dropout=0.1,
    )


def noisy_batch(num_samples: int, seed: int) -> Any:
    inputs = {
        "sample": normal(num_samples, seed, 3, 16, 16),
        "timestep": classes(num_samples, seed, 1000),
    }
    return inputs, normal(num_samples, seed + 1, 3, 16, 16)


def conditional_batch(num_samples: int, seed: int) -> Any:
    inputs, targets = noisy_batch(num_samples, seed)
    return {**inputs, "encoder_hidden_states": normal(num_samples, seed + 2, 5, 12)}, targets


def sample_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    return square_loss(output.sample, targets)


FAMILY = "diffusion (diffusers)"

ENTRIES = (
    Entry(
        "diffusers_unet",
        FAMILY,
        "`UNet2DModel`: skips, time embedding, attention",
        unet,
        noisy_batch,
        sample_loss,
        tolerance=2e-7,
        reason=LAYOUT,
        needs=("diffusers",),
    ),
    Entry(
        "diffusers_conditional",
        FAMILY,
        "`UNet2DConditionModel`: cross attention to a text encoding",
        conditional_unet,
        conditional_batch,
        sample_loss,
        needs=("diffusers",),
    ),
)
