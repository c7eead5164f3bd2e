"""Further families of Hugging Face: nobody chose them because they fit.

Each is built from a tiny configuration by the names of its classes, with what its family calls
width, depth and heads, and is otherwise as its configuration makes it, dropout included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.zoo.data import (
    VOCAB,
    WIDTH,
    causal_batch,
    classes,
    ids,
    masked_causal_batch,
    masked_language_batch,
    normal,
    picture_batch,
    sequence_batch,
)
from tests.zoo.entry import TIED, Batch, Entry
from tests.zoo.text import make

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**BASE, **TOKENS, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_hidden_layers": 3, "num_experts_per_tok": 2}
ENCODER = {**BASE, **TOKENS}
OLD = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": WIDTH,
    "n_layer": 4,
    "n_head": 4,
    **TOKENS,
    "use_cache": False,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "use_cache": False,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
SPEECH = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    **TOKENS,
}


def speech_batch(num_samples: int, seed: int) -> Batch:
    """Waves, and letters as labels of a CTC loss."""
    labels = ids(num_samples, seed + 1, time=5, vocab=VOCAB - 3) + 3
    return {"input_values": normal(num_samples, seed, 800), "labels": labels}, None


def sentence_batch(num_samples: int, seed: int) -> Batch:
    """Token ids, a mask, and one class."""
    inputs, _ = masked_causal_batch(num_samples, seed)
    return {**inputs, "labels": classes(num_samples, seed, 2)}, None


def span_batch(num_samples: int, seed: int) -> Batch:
    """Token ids, and where an answer begins and ends."""
    inputs = {"input_ids": ids(num_samples, seed)}
    starts = classes(num_samples, seed + 1, 6)
    return {**inputs, "start_positions": starts, "end_positions": starts + 3}, None


def patches_batch(num_samples: int, seed: int) -> Batch:
    """Series of values, and those that follow."""
    past, future = normal(num_samples, seed, 32, 3), normal(num_samples, seed + 1, 8, 3)
    return {"past_values": past, "future_values": future}, None


def boxes_batch(num_samples: int, seed: int) -> Batch:
    """Token ids with the place of each word on a page."""
    inputs, _ = masked_language_batch(num_samples, seed)
    corners = torch.arange(12).view(1, 12, 1).expand(num_samples, 12, 4).clone()
    return {**inputs, "bbox": corners}, None


def segments_batch(num_samples: int, seed: int) -> Batch:
    """Pictures, and a class for each point."""
    points = ids(num_samples, seed, 32 * 32, 10).view(num_samples, 32, 32)
    return {"pixel_values": normal(num_samples, seed, 3, 32, 32), "labels": points}, None


def depth_batch(num_samples: int, seed: int) -> Batch:
    """Pictures alone."""
    return {"pixel_values": normal(num_samples, seed, 3, 32, 32)}, None


def pairs_batch(num_samples: int, seed: int) -> Batch:
    """Texts and pictures."""
    inputs, _ = masked_causal_batch(num_samples, seed)
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    return {**inputs, "pixel_values": normal(num_samples, seed, 3, 32, 32)}, None


Row = tuple[str, str, Mapping[str, Any], Callable[[int, int], Batch]]

CAUSAL: dict[str, Row] = {
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **DECODER,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
        },
        causal_batch,
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", DECODER, masked_causal_batch),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**OLD, "rotary_dim": 4}, causal_batch),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", OLD, masked_causal_batch),
    "openai_gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", OLD, causal_batch),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", {**OLD, "rotary_dim": 4}, causal_batch),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", {**OLD, "dff": 64}, causal_batch),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 4, "n_head": 4, "use_cache": False},
        masked_causal_batch,
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", DECODER, masked_causal_batch),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "n_heads": 4,
            "n_layers": 4,
            "max_seq_len": 64,
            "use_cache": False,
        },
        causal_batch,
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", DECODER, causal_batch),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, causal_batch),
    "phimoe": (
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {**EXPERTS, "num_local_experts": 4},
        causal_batch,
    ),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", GROUPED, masked_causal_batch),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED, causal_batch),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", GROUPED, causal_batch),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED, masked_causal_batch),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**EXPERTS, "num_experts": 4}, causal_batch),
    "cohere": ("CohereForCausalLM", "CohereConfig", GROUPED, causal_batch),
    "granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED, causal_batch),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**EXPERTS, "num_local_experts": 4},
        causal_batch,
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}, causal_batch),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 8, "sliding_window": 4},
        masked_causal_batch,
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, masked_causal_batch),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
        },
        causal_batch,
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}, causal_batch),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {**GROUPED, "sliding_window": 4},
        masked_causal_batch,
    ),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", GROUPED, causal_batch),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", DECODER, causal_batch),
    "xglm": (
        "XGLMForCausalLM",
        "XGLMConfig",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "ffn_dim": 64,
            "num_layers": 4,
            "attention_heads": 4,
            "max_position_embeddings": 64,
            "layerdrop": 0.0,
            "use_cache": False,
            **TOKENS,
        },
        masked_causal_batch,
    ),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", {**DECODER, "layerdrop": 0.0}, causal_batch),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
        causal_batch,
    ),
    "glm": ("GlmForCausalLM", "GlmConfig", {**GROUPED, "head_dim": 8}, causal_batch),
    "helium": ("HeliumForCausalLM", "HeliumConfig", {**GROUPED, "head_dim": 8}, causal_batch),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED, causal_batch),
    "ernie4_5": (
        "Ernie4_5ForCausalLM",
        "Ernie4_5Config",
        {**GROUPED, "head_dim": 8},
        causal_batch,
    ),
    "bitnet": ("BitNetForCausalLM", "BitNetConfig", GROUPED, causal_batch),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**EXPERTS, "num_local_experts": 4, "head_dim": 8, "sliding_window": 4},
        causal_batch,
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": 4,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
            "use_cache": False,
            **TOKENS,
        },
        causal_batch,
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {**GROUPED, "lru_width": WIDTH, "attention_window_size": 8},
        causal_batch,
    ),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "attention_hidden_size": WIDTH,
            "num_hidden_layers": 4,
            "context_length": 64,
            "use_cache": False,
            **TOKENS,
        },
        causal_batch,
    ),
}

ENCODERS: dict[str, Row] = {
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER, masked_language_batch),
    "electra": (
        "ElectraForMaskedLM",
        "ElectraConfig",
        {**ENCODER, "embedding_size": 16},
        masked_language_batch,
    ),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {
            **ENCODER,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["c2p", "p2c"],
        },
        masked_language_batch,
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": WIDTH, "hidden_dim": 64, "n_layers": 4, "n_heads": 4},
        masked_language_batch,
    ),
    "mobilebert": (
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        {**ENCODER, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        masked_language_batch,
    ),
    "xlnet": (
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {"vocab_size": VOCAB, "d_model": WIDTH, "n_layer": 4, "n_head": 4, "d_inner": 64},
        sentence_batch,
    ),
    "funnel": (
        "FunnelForSequenceClassification",
        "FunnelConfig",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 64,
            "block_sizes": [2, 2],
        },
        sentence_batch,
    ),
    "longformer": (
        "LongformerForMaskedLM",
        "LongformerConfig",
        {**ENCODER, "attention_window": 4},
        masked_language_batch,
    ),
    "convbert": (
        "ConvBertForMaskedLM",
        "ConvBertConfig",
        {**ENCODER, "embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 2},
        masked_language_batch,
    ),
    "fnet": ("FNetForSequenceClassification", "FNetConfig", ENCODER, sentence_batch),
    "nystromformer": (
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        {**ENCODER, "segment_means_seq_len": 12, "num_landmarks": 12},
        masked_language_batch,
    ),
    "squeezebert": (
        "SqueezeBertForMaskedLM",
        "SqueezeBertConfig",
        {**ENCODER, "embedding_size": WIDTH},
        masked_language_batch,
    ),
    "roformer": (
        "RoFormerForMaskedLM",
        "RoFormerConfig",
        {**ENCODER, "embedding_size": 16},
        masked_language_batch,
    ),
    "rembert": (
        "RemBertForMaskedLM",
        "RemBertConfig",
        {**ENCODER, "input_embedding_size": 16, "output_embedding_size": 24},
        masked_language_batch,
    ),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", ENCODER, masked_language_batch),
    "ibert": ("IBertForSequenceClassification", "IBertConfig", ENCODER, sentence_batch),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**ENCODER, "local_attention": 4, "cls_token_id": 3, "sep_token_id": 4},
        masked_language_batch,
    ),
    "canine": (
        "CanineForSequenceClassification",
        "CanineConfig",
        {
            **ENCODER,
            "num_hash_buckets": 64,
            "local_transformer_stride": 4,
            "downsampling_rate": 4,
            "upsampling_kernel_size": 4,
        },
        sentence_batch,
    ),
    "esm": (
        "EsmForMaskedLM",
        "EsmConfig",
        {**ENCODER, "mask_token_id": 3, "position_embedding_type": "rotary"},
        masked_language_batch,
    ),
    "splinter": ("SplinterForQuestionAnswering", "SplinterConfig", ENCODER, span_batch),
    "layoutlm": (
        "LayoutLMForMaskedLM",
        "LayoutLMConfig",
        {**ENCODER, "max_2d_position_embeddings": 64},
        boxes_batch,
    ),
}

SEQUENCES: dict[str, Row] = {
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART, sequence_batch),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", BART, sequence_batch),
    "marian": ("MarianMTModel", "MarianConfig", BART, sequence_batch),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", BART, sequence_batch),
    "m2m_100": (
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        {**BART, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
        sequence_batch,
    ),
    "prophetnet": (
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
        sequence_batch,
    ),
    "longt5": (
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        {**T5, "local_radius": 3, "encoder_attention_type": "local"},
        sequence_batch,
    ),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5, sequence_batch),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5, sequence_batch),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            **T5,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "router_jitter_noise": 0.01,
        },
        sequence_batch,
    ),
}

OTHERS: dict[str, Row] = {
    "deit": ("DeiTForImageClassification", "DeiTConfig", VISION, picture_batch(32)),
    "beit": ("BeitForImageClassification", "BeitConfig", VISION, picture_batch(32)),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", VISION, picture_batch(32)),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {"hidden_sizes": [16, 24, 32], "depths": [1, 1, 1], "num_stages": 3, "num_labels": 10},
        picture_batch(32),
    ),
    "poolformer": (
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 10},
        picture_batch(32),
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
            "num_labels": 10,
        },
        segments_batch,
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
            "num_attention_heads": 2,
            "image_size": 32,
            "num_labels": 10,
        },
        picture_batch(32),
    ),
    "regnet": (
        "RegNetForImageClassification",
        "RegNetConfig",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "groups_width": 8,
            "num_labels": 10,
        },
        picture_batch(32),
    ),
    "vit_mae": (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {
            **VISION,
            "decoder_hidden_size": 16,
            "decoder_intermediate_size": 32,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
        },
        depth_batch,
    ),
    "hubert": ("HubertForCTC", "HubertConfig", SPEECH, speech_batch),
    "wavlm": ("WavLMForCTC", "WavLMConfig", SPEECH, speech_batch),
    "sew": (
        "SEWForCTC",
        "SEWConfig",
        {**SPEECH, "squeeze_factor": 2},
        speech_batch,
    ),
    "patchtst": (
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 4,
            "patch_stride": 4,
            "prediction_length": 8,
            "d_model": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 32,
            "loss": "mse",
        },
        patches_batch,
    ),
    "patchtsmixer": (
        "PatchTSMixerForPrediction",
        "PatchTSMixerConfig",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 4,
            "patch_stride": 4,
            "prediction_length": 8,
            "d_model": 8,
            "num_layers": 3,
        },
        patches_batch,
    ),
}

HEADINGS = {
    "further decoders (Hugging Face)": CAUSAL,
    "further encoders (Hugging Face)": ENCODERS,
    "further sequence to sequence models (Hugging Face)": SEQUENCES,
    "further pictures, speech and series (Hugging Face)": OTHERS,
}
EXACT = frozenset(
    {
        "gpt_neox",
        "gptj",
        "codegen",
        "phi",
        "phi3",
        "phimoe",
        "stablelm",
        "olmo",
        "olmo2",
        "olmoe",
        "granite",
        "granitemoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "mistral",
        "nemotron",
        "persimmon",
        "deepseek_v3",
        "glm",
        "helium",
        "bitnet",
        "gpt_oss",
        "mamba2",
        "rwkv",
        "xlnet",
        "funnel",
        "fnet",
        "rembert",
        "ibert",
        "canine",
        "splinter",
        "switch_transformers",
        "deit",
        "beit",
        "dinov2",
        "convnextv2",
        "poolformer",
        "segformer",
        "mobilevit",
        "regnet",
        "hubert",
        "sew",
        "patchtst",
        "patchtsmixer",
    }
)
"""Families without a parameter that several packs read, so that every bit is equal."""
SUMS = frozenset({"hubert"})
"""Families whose loss is a sum over the samples."""


def build(model: str, config: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Return what makes a model."""
    return lambda: make(model, config, **settings)


def entry(name: str, family: str, row: Row) -> Entry:
    """The entry of a family."""
    model, config, settings, batch = row
    known: dict[str, Any] = {} if name in EXACT else {"tolerance": 2e-7, "reason": TIED}
    made = build(model, config, settings)
    return Entry(name, family, model, made, batch, summed=name in SUMS, **known)


ENTRIES = [
    entry(name, family, row) for family, rows in HEADINGS.items() for name, row in rows.items()
]
