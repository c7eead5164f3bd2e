"""Shells hold no parameters; binding reaches every name; replay is safe from many threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from harmony.capture import ModuleShell, capture
from harmony.errors import CaptureError

from .models import CASES, GPT, CustomFunction, ids, make, token_loss, tokens, vectors
from .packs import captured_case

CPU = torch.device("cpu")


def tensors_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def test_a_module_shell_holds_no_parameter_memory() -> None:
    net = GPT()
    shell = capture(net, (ids(4),)).make_shell(CPU)
    for name, param in shell.root.named_parameters():
        assert param.device.type == "meta", name
        assert param.shape == net.get_parameter(name).shape
    own = {id(tensor) for tensor in tensors_of(net).values()}
    assert not own.intersection(id(tensor) for tensor in tensors_of(shell.root).values())
    assert all(a is not b for a, b in zip(net.modules(), shell.root.modules(), strict=True))


def test_binding_reaches_every_name_of_a_tied_parameter() -> None:
    shell = capture(GPT(tied=True), (ids(4),)).make_shell(CPU)
    weight = nn.Parameter(torch.zeros(61, 32))
    shell.bind({"tokens.weight": weight})
    root: Any = shell.root
    assert root.tokens.weight is weight and root.head.weight is weight
    assert shell.tensor("tokens.weight") is weight
    shell.release(["tokens.weight"])
    assert root.tokens.weight is root.head.weight
    assert root.head.weight.device.type == "meta"


def test_binding_reaches_lists_and_plain_attributes() -> None:
    net = nn.LSTM(8, 8)
    net.mirror = [net.weight_ih_l0]  # type: ignore[assignment]
    net.__dict__["alias"] = net.bias_hh_l0
    shell = ModuleShell(net, CPU)
    shell.bind(dict(net.named_parameters()))
    copy: Any = shell.root
    assert copy.mirror[0] is net.weight_ih_l0 and copy.alias is net.bias_hh_l0
    assert all(a is b for a, b in zip(copy._flat_weights, net._flat_weights, strict=True))
    x = torch.randn(3, 2, 8)
    assert torch.equal(copy(x)[0], net(x)[0])


def test_plain_tensors_and_buffers_may_be_bound_too() -> None:
    shell = capture(CustomFunction(), (vectors(4),)).make_shell(CPU)
    view = torch.ones(64)[16:48]
    shell.bind({"scale": view, "gain": view})
    root: Any = shell.root
    assert root.scale is view and root.gain is view


def test_threads_replay_at_once_while_another_traces() -> None:
    net, call = make("gpt"), tokens(8)
    captured = capture(net, call[0], targets=call[2], loss=token_loss)
    captured.ensure(2)
    inputs = captured.flatten_inputs(*call)
    found: dict[int, list[torch.Tensor]] = {}
    graph = captured.graph
    net_tensors = tensors_of(net)

    def work(thread: int) -> None:
        shell = captured.make_shell(CPU)
        shell.bind({info.name: net_tensors[info.name] for info in captured.params})
        results = []
        for _ in range(5):
            values = captured.split(inputs, 2 * thread, 2 * thread + 2)
            values = captured.run(0, 2, shell, values, 2, wanted=graph.pack_outputs(0, 2))
            results.append(next(iter(values.values())).shape)
        found[thread] = results  # type: ignore[assignment]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    captured.ensure(3)
    for thread in threads:
        thread.join()
    assert all(found[index] == [(2, 12, 32)] * 5 for index in range(4))


def test_interior_values_are_let_go_at_their_last_use() -> None:
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    captured = capture(net, (torch.randn(4, 64),))
    shell = captured.make_shell(CPU)
    shell.bind(tensors_of(net))
    seen: list[int] = []
    alive: list[Any] = []

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        import weakref

        alive.append(weakref.ref(output))
        seen.append(sum(ref() is not None for ref in alive))

    for module in shell.root:  # type: ignore[union-attr]
        module.register_forward_hook(hook)
    values = captured.flatten_inputs((torch.randn(4, 64),), {})
    with torch.no_grad():
        captured.run(0, 6, shell, values, 4, wanted=captured.graph.output_ids)
    assert seen == [1, 2, 2, 2, 2, 2]


def test_inputs_that_are_changed_in_place_are_cloned() -> None:
    net, x = make("in_place"), vectors(4)
    captured = capture(net, (x,))
    shell = captured.make_shell(CPU)
    shell.bind(tensors_of(net))
    graph = captured.graph
    values, before = {0: x}, x.clone()
    for layer in range(graph.num_layers):
        kept = {index: tensor.clone() for index, tensor in values.items()}
        wanted = graph.layers[layer].outputs
        made = captured.run(layer, layer + 1, shell, values, 4, wanted=wanted)
        assert all(torch.equal(kept[index], values[index]) for index in kept)
        values |= made
    assert torch.equal(x, before)
    assert torch.equal(values[graph.output_ids[0]], net(x.clone()))


def test_what_a_later_layer_changes_is_returned_as_it_was() -> None:
    net, x = make("in_place"), vectors(4)
    captured = capture(net, (x,))
    shell = captured.make_shell(CPU)
    shell.bind(tensors_of(net))
    alone = {0: x}
    for layer in captured.graph.layers:
        one = layer.index
        alone |= captured.run(one, one + 1, shell, dict(alone), 4, wanted=layer.outputs)
    wanted = [value for layer in captured.graph.layers for value in layer.outputs]
    last = captured.graph.num_layers
    together = captured.run(0, last, shell, {0: x}, 4, wanted=wanted)
    assert all(torch.equal(together[value], alone[value]) for value in wanted)


def test_a_missing_value_is_named() -> None:
    captured = capture(GPT(), (ids(4),))
    with pytest.raises(CaptureError, match=r"layers \[2:3\] read value 2"):
        captured.run(2, 3, captured.make_shell(CPU), {}, 4, wanted=[])


def test_nothing_left_behind_keeps_a_graph_alive() -> None:
    net = make("leaves_behind")
    captured = capture(net, (vectors(4),))
    shell = captured.make_shell(CPU)
    shell.bind(tensors_of(net))
    values = captured.flatten_inputs((vectors(4),), {})
    graph = captured.graph
    captured.run(0, graph.num_layers, shell, values, 4, wanted=graph.output_ids)
    assert all(part.aux is None for part in shell.root.parts)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"custom_function"}))
def test_layers_run_on_another_device(name: str) -> None:
    """On the meta device anything left on the CPU fails (it has no autocast)."""
    net, captured, call = captured_case(name)
    meta = torch.device("meta")
    shell = captured.make_shell(meta)
    shell.bind({key: tensor.detach().to(meta) for key, tensor in unique(net).items()})
    graph = captured.graph
    inputs = captured.split(captured.flatten_inputs(*call), 0, 2)
    values = {value: tensor.to(meta) for value, tensor in inputs.items()}
    (loss,) = captured.run(0, graph.num_layers, shell, values, 2, wanted=[graph.loss]).values()
    assert loss.device == meta


def unique(net: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors by canonical name."""
    return dict((*net.named_parameters(), *net.named_buffers()))
