"""The LayerGraph: what it says agrees with itself, with the trace and with real tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harmony.capture import Captured, capture
from harmony.core.layergraph import MODEL_INPUT
from harmony.errors import ConfigError

from .models import CASES, GPT, Block, LongSkip, ids, llama, make, mlp, token_loss, vectors
from .packs import captured_case


def bound_shell(net: nn.Module, captured: Captured) -> Any:
    shell = captured.make_shell(torch.device("cpu"))
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    shell.bind({info.name: tensors[info.name] for info in (*captured.params, *captured.buffers)})
    return shell


@pytest.mark.parametrize("name", CASES)
def test_the_graph_agrees_with_itself(name: str) -> None:
    _, captured, _ = captured_case(name)
    graph = captured.graph
    for index, value in enumerate(graph.values):
        assert value.id == index
        assert value.producer < graph.num_layers
        assert list(value.consumers) == sorted(set(value.consumers))
        assert all(consumer > value.producer for consumer in value.consumers)
        assert value.consumers or value.is_output
        assert all(index in graph.layers[c].inputs for c in value.consumers)
        if value.producer != MODEL_INPUT:
            assert index in graph.layers[value.producer].outputs
    producers = [value.producer for value in graph.values]
    assert producers == sorted(producers)
    assert graph.loss is not None and graph.output_ids == (graph.loss,)
    assert graph.values[graph.loss].producer == graph.num_layers - 1
    for shared in graph.shared:
        assert len(shared.layers) > 1
        assert all(shared.id in graph.layers[layer].shared for layer in shared.layers)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_one_place(name: str) -> None:
    net, captured, _ = captured_case(name)
    graph = captured.graph
    names = [info.name for info in captured.params]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    assert [info.name for info in captured.buffers] == [n for n, _ in net.named_buffers()]
    for info in (*captured.params, *captured.buffers):
        unused = info.name.startswith("unused")
        assert (info.layer is None, info.shared_id is None).count(True) == 1 + unused
        if info.shared_id is not None:
            assert graph.shared[info.shared_id].name == info.name
    for layer in graph.layers:
        own = captured.tensors_of(layer.index)
        assert layer.params == tuple(info.name for info in own)
        assert layer.weight_nbytes == sum(-(-info.nbytes // 64) * 64 for info in own)
        trained = [info for info in own if info.requires_grad]
        assert layer.gradient_nbytes == sum(-(-info.nbytes // 64) * 64 for info in trained)
    order = [info.layer for info in captured.params if info.layer is not None]
    assert order == sorted(order)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_samples", [2, 3])
def test_value_sizes_are_those_of_real_tensors(name: str, num_samples: int) -> None:
    net, captured, call = captured_case(name)
    graph = captured.graph
    captured.ensure(num_samples)
    values = captured.split(captured.flatten_inputs(*call), 0, num_samples)
    shell = bound_shell(net, captured)
    for layer in range(graph.num_layers):
        values |= captured.run(
            layer, layer + 1, shell, values, num_samples, wanted=graph.layers[layer].outputs
        )
    for value in graph.values:
        tensor = values[value.id]
        assert tensor.numel() * tensor.element_size() == value.nbytes(num_samples), value
        shape, _, dtype = captured.value_form(value.id, num_samples)
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.requires_grad == value.requires_grad
        if value.batch_dim is not None:
            assert tensor.shape[value.batch_dim] == num_samples


def test_blocks_share_a_signature_and_others_do_not() -> None:
    _, captured, _ = captured_case("gpt")
    signatures = [layer.signature for layer in captured.graph.layers]
    blocks = [layer.signature for layer in captured.graph.layers if "blocks" in layer.name]
    assert len(blocks) == 4 and len(set(blocks)) == 1
    assert len(set(signatures)) == len(signatures) - 3


def test_a_frozen_or_different_block_has_another_signature() -> None:
    _, captured, _ = captured_case("frozen")
    blocks = [layer.signature for layer in captured.graph.layers if "blocks" in layer.name]
    assert blocks[0] == blocks[3] and len(set(blocks)) == 3
    net = nn.Sequential(Block(dropout=0.1), Block(dropout=0.2), nn.Linear(32, 2))
    layers = capture(net, (vectors(4),)).graph.layers
    assert layers[0].signature != layers[1].signature


def test_who_draws_random_numbers() -> None:
    _, captured, _ = captured_case("gpt")
    assert [layer.uses_rng for layer in captured.graph.layers] == [
        False,  # tokens
        True,  # positions, with the dropout behind it
        *[True] * 4,
        False,
        False,
    ]
    still = capture(GPT(dropout=0.0).train(), (ids(4),))
    assert not any(layer.uses_rng for layer in still.graph.layers)
    resting = capture(GPT().eval(), (ids(4),))
    assert not any(layer.uses_rng for layer in resting.graph.layers)


def test_the_long_skip_is_a_value_with_a_late_last_consumer() -> None:
    graph = capture(LongSkip(), (torch.randn(6, 32),)).graph
    skip = graph.values[1]
    assert (skip.producer, skip.consumers) == (0, (1, 2, 3, 4))


def test_dropout_and_activations_join_their_neighbours() -> None:
    graph = capture(mlp(), (vectors(4),)).graph
    assert [layer.name for layer in graph.layers] == ["0", "3", "6", "9", "12"]


def test_masks_do_not_depend_on_the_batch_and_do_not_pin_it() -> None:
    net = llama().train()
    graph = capture(net, (), {"input_ids": ids(4)}).graph
    tables = [value for value in graph.values if value.name == "model.rotary_emb"]
    assert tables and all(v.batch_dim is None and v.nbytes_per_sample == 0 for v in tables)
    assert not any(v.requires_grad for v in tables)
    assert not any(layer.mixes_samples for layer in graph.layers)


class BatchMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        x = self.layers[1](x - x.mean(0))
        return self.layers[2](x)


def test_layers_that_mix_samples_are_named() -> None:
    graph = capture(BatchMean(), (vectors(4),)).graph
    assert [layer.mixes_samples for layer in graph.layers] == [True, False, False]
    norm = nn.BatchNorm1d(32, track_running_stats=False)
    graph = capture(
        nn.Sequential(nn.Linear(32, 32), norm, nn.Linear(32, 2)), (vectors(4, 0, 32),)
    ).graph
    assert [layer.mixes_samples for layer in graph.layers] == [False, True, False]


def test_blocks_are_opened_where_the_limit_says_so() -> None:
    net = GPT(depth=2)
    whole = capture(net, (ids(4),)).graph
    opened = capture(net, (ids(4),), max_layer_nbytes=40_000).graph
    assert opened.num_layers > whole.num_layers
    assert {"blocks.0.qkv", "blocks.1.mlp.0"} <= {layer.name for layer in opened.layers}
    assert opened.weight_nbytes() == whole.weight_nbytes()


def test_outputs_in_the_drop_in_form() -> None:
    net = make("nested")
    x = vectors(4)
    captured = capture(net, (x,), {"scale": 0.5})
    graph = captured.graph
    assert graph.loss is None and len(graph.output_ids) == 3
    values = captured.split(captured.flatten_inputs((x,), {"scale": 0.5}), 0, 4)
    torch.manual_seed(3)
    found = captured.run(
        0, graph.num_layers, bound_shell(net, captured), values, 4, wanted=graph.output_ids
    )
    torch.manual_seed(3)
    plain = net(x, scale=0.5)
    rebuilt = captured.unflatten_output(found, 4)
    assert type(rebuilt["out"]) is type(plain["out"]) and rebuilt["n"] == 4
    assert torch.equal(rebuilt["out"].hidden, plain["out"].hidden)
    assert torch.equal(rebuilt["pooled"][1][0], plain["pooled"][1][0])
    assert rebuilt["out"].extra["count"] == 3 and rebuilt["out"].extra["none"] is None


def test_a_hugging_face_output_comes_back_as_one() -> None:
    net = llama().train()
    captured = capture(net, (), {"input_ids": ids(4)})
    (logits,) = captured.graph.output_ids
    output = captured.unflatten_output({logits: torch.ones(2)}, 4)
    assert type(output).__name__ == "CausalLMOutputWithPast"
    assert torch.equal(output.logits, torch.ones(2)) and output.loss is None


class ReturnsInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return x, self.first.weight, self.last(self.first(x)), None


def test_inputs_and_parameters_may_be_returned() -> None:
    net, x = ReturnsInputs(), torch.randn(4, 8)
    captured = capture(net, (x,))
    graph = captured.graph
    values = captured.flatten_inputs((x,), {})
    shell = bound_shell(net, captured)
    found = captured.run(0, graph.num_layers, shell, values, 4, wanted=graph.output_ids)
    one, weight, out, none = captured.unflatten_output(found, 4)
    assert torch.equal(one, x) and torch.equal(weight, net.first.weight) and none is None
    assert torch.equal(out, net(x)[2])


def test_a_batch_dimension_may_be_named() -> None:
    net = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8))
    by_time = vectors(5, 0, 3, 32)
    graph = capture(net, (by_time,), batch_dims={"args[0]": 1}).graph
    assert [value.batch_dim for value in graph.values] == [1, 1, 1]
    assert graph.values[1].nbytes_per_sample == 5 * 8 * 4
    with pytest.raises(ConfigError, match="x"):
        capture(net, (by_time,), batch_dims={"x": 1})


class Contrastive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.LayerNorm([8])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        pairs = h @ h.t()
        return self.last(h) * pairs.sum()


def test_a_value_of_quadratic_size_stays_inside_a_layer_or_its_batch_is_the_only_one() -> None:
    captured = capture(Contrastive(), (torch.randn(4, 8),))
    assert all(value.nbytes(4) <= 4 * 8 * 4 for value in captured.graph.values)
    alone = capture(nn.Sequential(Pairs(), nn.Linear(4, 8), Pairs()), (torch.randn(4, 8),))
    assert alone.only_size == 4 and "samples" in alone.graph.whole_batch
    returned = capture(Pairs(), (torch.randn(4, 8),))
    assert returned.only_size == 4 and "(4, 4)" in returned.graph.whole_batch


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.t()) * self.scale


def test_the_graph_for_the_wrong_options() -> None:
    with pytest.raises(ConfigError, match="not both"):
        capture(GPT(), (ids(4),), loss=token_loss, output_loss=True, targets=ids(4))
    with pytest.raises(ConfigError, match="without a loss"):
        capture(GPT(), (ids(4),), targets=ids(4))
