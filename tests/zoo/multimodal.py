"""Vision, audio and vision-language models of Hugging Face, from tiny configurations."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.data import VOCAB, WIDTH, classes, ids, normal, padding, picture_batch
from tests.zoo.entry import TIED, Entry
from tests.zoo.text import make

TRANSFORMER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def vit() -> nn.Module:
    settings = {"image_size": 16, "patch_size": 4, "num_labels": 10}
    return make("ViTForImageClassification", "ViTConfig", **TRANSFORMER, **settings)


def swin() -> nn.Module:
    return make(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=2,
        num_labels=10,
        drop_path_rate=0.2,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )


def convnext() -> nn.Module:
    return make(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        depths=[1, 1, 2, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_labels=10,
        drop_path_rate=0.2,
    )


def efficientnet() -> nn.Module:
    return make(
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        num_labels=10,
        hidden_dim=320,
        drop_connect_rate=0.2,
        dropout_rate=0.2,
    )


def clip() -> nn.Module:
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "attention_dropout": 0.1,
    }
    text = {**tower, "vocab_size": VOCAB, "max_position_embeddings": 32, "eos_token_id": VOCAB - 1}
    vision = {**tower, "image_size": 16, "patch_size": 4}
    return make(
        "CLIPModel", "CLIPConfig", text_config=text, vision_config=vision, projection_dim=16
    )


def clip_batch(num_samples: int, seed: int) -> Any:
    tokens = ids(num_samples, seed, vocab=VOCAB - 1)
    tokens[:, -1] = VOCAB - 1
    return {
        "input_ids": tokens,
        "pixel_values": normal(num_samples, seed, 3, 16, 16),
        "attention_mask": padding(num_samples),
        "return_loss": True,
    }, None


def whisper() -> nn.Module:
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    return make(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        vocab_size=VOCAB,
        d_model=WIDTH,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        dropout=0.1,
        attention_dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
        **sides,
    )


def whisper_batch(num_samples: int, seed: int) -> Any:
    spectrum = normal(num_samples, seed, 8, 32)
    return {"input_features": spectrum, "labels": ids(num_samples, seed, time=6)}, None


def wav2vec2() -> nn.Module:
    return make(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.3,
        apply_spec_augment=True,
        mask_time_length=2,
        mask_time_prob=0.3,
        mask_feature_length=2,
        mask_feature_prob=0.2,
        classifier_proj_size=16,
        num_labels=10,
    )


def wave_batch(num_samples: int, seed: int) -> Any:
    return {
        "input_values": normal(num_samples, seed, 400),
        "labels": classes(num_samples, seed),
    }, None


VISION = "vision (Hugging Face)"
OTHER = "audio and several inputs (Hugging Face)"

ENTRIES = (
    Entry("vit", VISION, "class token, dropout", vit, picture_batch(16)),
    Entry("swin", VISION, "shifted windows, stochastic depth", swin, picture_batch(16)),
    Entry(
        "convnext", VISION, "depthwise convolutions, stochastic depth", convnext, picture_batch(64)
    ),
    Entry(
        "efficientnet",
        VISION,
        "BatchNorm, squeeze and excitation, drop connect",
        efficientnet,
        picture_batch(32),
    ),
    Entry("clip", OTHER, "two towers, a loss over pairs of samples", clip, clip_batch),
    Entry(
        "whisper",
        OTHER,
        "convolutions in front of an encoder and a decoder",
        whisper,
        whisper_batch,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry(
        "wav2vec2",
        OTHER,
        "weight norm, masks from NumPy, layers skipped at random",
        wav2vec2,
        wave_batch,
    ),
)
