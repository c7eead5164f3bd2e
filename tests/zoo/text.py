"""Language models of Hugging Face, from tiny configurations with random weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.data import (
    VOCAB,
    WIDTH,
    causal_batch,
    ids,
    masked_causal_batch,
    masked_language_batch,
    ragged_batch,
    sequence_batch,
)
from tests.zoo.entry import TIED, Entry

DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "use_cache": False,
}
EXPERTS = {
    **DECODER,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "attention_dropout": 0.1,
    "output_router_logits": True,
}


def make(model: str, config: str, **settings: Any) -> nn.Module:
    """Build a model of Hugging Face by the names of its classes."""
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def gpt2(dropout: float = 0.1) -> nn.Module:
    settings = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": WIDTH, "n_layer": 4, "n_head": 4}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return make("GPT2LMHeadModel", "GPT2Config", **settings, **dropouts, use_cache=False)


def llama() -> nn.Module:
    settings = {"num_key_value_heads": 2, "attention_dropout": 0.1}
    return make("LlamaForCausalLM", "LlamaConfig", **DECODER, **settings)


def bert() -> nn.Module:
    return make("BertForMaskedLM", "BertConfig", **{**DECODER, "is_decoder": False})


def albert() -> nn.Module:
    settings = {**DECODER, "embedding_size": 16, "hidden_dropout_prob": 0.1}
    return make("AlbertForMaskedLM", "AlbertConfig", **settings, attention_probs_dropout_prob=0.1)


def t5() -> nn.Module:
    return make(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        use_cache=False,
    )


def bart() -> nn.Module:
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 3), ("attention_heads", 4), ("ffn_dim", 64))
    }
    return make(
        "BartForConditionalGeneration",
        "BartConfig",
        vocab_size=VOCAB,
        d_model=WIDTH,
        max_position_embeddings=64,
        attention_dropout=0.1,
        encoder_layerdrop=0.3,
        decoder_layerdrop=0.3,
        use_cache=False,
        **sides,
    )


def opt() -> nn.Module:
    return make(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        attention_dropout=0.1,
        use_cache=False,
    )


def gemma() -> nn.Module:
    settings = {"num_key_value_heads": 1, "head_dim": 8, "attention_dropout": 0.1}
    return make("Gemma2ForCausalLM", "Gemma2Config", **DECODER, **settings, sliding_window=4)


def mixtral(experts: str | None = None) -> nn.Module:
    settings = {**EXPERTS, "num_local_experts": 4, "sliding_window": None}
    model: Any = make("MixtralForCausalLM", "MixtralConfig", **settings)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model  # type: ignore[no-any-return]


def qwen_moe() -> nn.Module:
    settings = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
    return make("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **EXPERTS, **settings)


def mamba() -> nn.Module:
    return make(
        "MambaForCausalLM",
        "MambaConfig",
        vocab_size=VOCAB,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=4,
        use_cache=False,
    )


def growing_batch(num_samples: int, seed: int) -> Any:
    """Sequences that are longer in each step."""
    tokens = ids(num_samples, seed, time=8 + seed // 50)
    return {"input_ids": tokens, "labels": tokens.clone()}, None


def counted_batch(num_samples: int, seed: int) -> Any:
    """Unequal numbers of labels, and their number in the whole minibatch beside them."""
    inputs, targets = ragged_batch(num_samples, seed)
    counted = (inputs["labels"][:, 1:] != -100).sum()
    return {**inputs, "num_items_in_batch": counted.repeat(num_samples)[0]}, targets


FAMILY = "text (Hugging Face)"
EQUAL_TO_WHOLE = {"whole_batch": True, "tolerance": 1e-6}
WHOLE = "compared with the loss of the whole minibatch: sums over other numbers of rows"

ENTRIES = (
    Entry(
        "gpt2",
        FAMILY,
        "tied embedding, dropout, attention mask",
        gpt2,
        masked_causal_batch,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry(
        "gpt2_ragged",
        FAMILY,
        "microbatches ignore unequal numbers of labels",
        lambda: gpt2(dropout=0.0),
        ragged_batch,
        **EQUAL_TO_WHOLE,
        reason=WHOLE,
    ),
    Entry(
        "gpt2_counted",
        FAMILY,
        "the same with `num_items_in_batch`",
        lambda: gpt2(dropout=0.0),
        counted_batch,
        **EQUAL_TO_WHOLE,
        reason=WHOLE,
    ),
    Entry(
        "llama",
        FAMILY,
        "grouped queries, rotary tables read by all blocks",
        llama,
        causal_batch,
        num_samples=6,
    ),
    Entry(
        "llama_growing",
        FAMILY,
        "other lengths in each step, a smaller last batch",
        llama,
        growing_batch,
        num_samples=4,
        last_samples=3,
    ),
    Entry(
        "bert",
        FAMILY,
        "tied decoder, padding mask",
        bert,
        masked_language_batch,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry(
        "albert",
        FAMILY,
        "one block called four times",
        albert,
        masked_language_batch,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry(
        "t5",
        FAMILY,
        "encoder output read by all decoder blocks, shared position bias",
        t5,
        sequence_batch,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry(
        "bart",
        FAMILY,
        "encoder and decoder that skip layers at random",
        bart,
        sequence_batch,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry(
        "opt",
        FAMILY,
        "projections around the blocks, positions from the mask",
        opt,
        masked_causal_batch,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry(
        "gemma2",
        FAMILY,
        "sliding windows, soft caps, scaled tied embedding",
        gemma,
        causal_batch,
        tolerance=2e-7,
        reason=TIED,
    ),
    Entry("mixtral", FAMILY, "grouped experts, router loss of all layers", mixtral, causal_batch),
    Entry(
        "mixtral_eager",
        FAMILY,
        "a loop over the experts that were chosen",
        lambda: mixtral("eager"),
        causal_batch,
    ),
    Entry("qwen3_moe", FAMILY, "experts, norms of queries and keys", qwen_moe, causal_batch),
    Entry(
        "mamba",
        FAMILY,
        "state space, convolution over time",
        mamba,
        causal_batch,
        tolerance=2e-7,
        reason=TIED,
    ),
)
