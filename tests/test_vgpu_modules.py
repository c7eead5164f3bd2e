"""Modules and layouts on the virtual GPU: recurrent networks, moved modules, sparse, nested."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import rnn

from harmony.vgpu import api as vgpu

DEVICES = ("cpu", "vgpu:0")


@pytest.fixture(autouse=True)
def gpus():
    gc.collect()
    vgpu.virtual_gpus(count=2, memory="64MiB")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_on_both(function):
    """Call ``function(device)`` on CPU and vgpu; its tensors must agree in bits and strides."""
    results = []
    for device in DEVICES:
        torch.manual_seed(0)
        results.append(function(device))
    assert len(results[0]) == len(results[1]) > 0
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert (a is None) == (b is None), f"result {i}"
        if a is None:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype and a.layout == b.layout, f"result {i}"
        if a.layout == torch.strided:
            assert a.stride() == b.stride(), f"result {i}"
        assert torch.equal(a.detach().to_dense(), b.detach().cpu().to_dense()), f"result {i}"


def on(device, module, *data):
    """Return a copy of a module on a device, and leaves like the data; then seed the device."""
    placed = [x.to(device, copy=True).requires_grad_(x.is_floating_point()) for x in data]
    moved = copy.deepcopy(module).to(device)
    torch.manual_seed(7)
    return moved, *placed


def gradients(module, *leaves):
    return [p.grad for p in module.parameters()] + [x.grad for x in leaves]


# ---------------------------------------------------------------- recurrent networks

RNNS = {
    "lstm": lambda **kw: nn.LSTM(5, 8, **kw),
    "gru": lambda **kw: nn.GRU(5, 8, **kw),
    "tanh": lambda **kw: nn.RNN(5, 8, **kw),
    "relu": lambda **kw: nn.RNN(5, 8, nonlinearity="relu", **kw),
    "projected_lstm": lambda **kw: nn.LSTM(5, 8, proj_size=3, **kw),
}
SHAPES = {
    "plain": {},
    "deep": {"num_layers": 2, "dropout": 0.4},
    "bidirectional": {"bidirectional": True, "bias": False},
    "both": {"num_layers": 2, "dropout": 0.4, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", RNNS)
@pytest.mark.filterwarnings("ignore:.*projections.*")
def test_recurrent_networks_give_the_cpu_bits(kind, shape, dtype):
    torch.manual_seed(1)
    network = RNNS[kind](**SHAPES[shape]).to(dtype)
    data = torch.randn(4, 6, 5, dtype=dtype)

    def train_and_infer(device):
        net, x = on(device, network, data)
        output, last = net(x)
        states = last if isinstance(last, tuple) else (last,)
        (output.square().sum() + sum(s.sum() for s in states)).backward()
        with torch.no_grad():
            quiet = net.eval()(x)[0]
        return [output, *states, quiet, *gradients(net, x)]

    assert_same_on_both(train_and_infer)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", RNNS)
def test_packed_sequences_give_the_cpu_bits(kind, shape):
    torch.manual_seed(1)
    network = RNNS[kind](**SHAPES[shape])
    batch_first = network.batch_first
    data = torch.randn(4, 6, 5)
    lengths = [6, 2, 3, 3] if batch_first else [4, 2, 3, 3, 1, 4]

    def run(device):
        net, x = on(device, network, data)
        packed = rnn.pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
        output, last = net(packed)
        padded, _ = rnn.pad_packed_sequence(output, batch_first)
        states = last if isinstance(last, tuple) else (last,)
        (padded.square().sum() + sum(s.sum() for s in states)).backward()
        return [padded, *states, *gradients(net, x)]

    assert_same_on_both(run)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_give_the_cpu_bits(kind):
    torch.manual_seed(1)
    cell = kind(5, 8)

    def run(device):
        net, x = on(device, cell, torch.linspace(-1, 1, 20).view(4, 5))
        state = net(x, net(x))
        state = state if isinstance(state, tuple) else (state,)
        sum(s.square().sum() for s in state).backward()
        return [*state, *gradients(net, x)]

    assert_same_on_both(run)


# ---------------------------------------------------------------- modules that move


def tied():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    return model


def test_moving_a_module_keeps_its_parameters_and_their_ties():
    model = tied()
    weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for device in ("vgpu:0", "vgpu:1", "cpu", "vgpu:0"):
        model.to(device)
        assert model[0].weight is model[1].weight is weight and weight.device.type in device
        assert len(list(model.parameters())) == 1
    model(torch.tensor([1, 2], device="vgpu:0")).sum().backward()
    model.to("vgpu:1")
    assert weight.grad.device == torch.device("vgpu:1")
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, weight)
    model.bfloat16()
    assert model[0].weight is model[1].weight


def test_data_of_another_device_can_be_assigned_as_between_cpu_and_cuda():
    x = nn.Parameter(torch.ones(3))
    x.data = torch.full((2, 2), 5.0, device="vgpu:1")
    assert x.device == torch.device("vgpu:1") and x.shape == (2, 2) and x.is_leaf
    (x * 2).sum().backward()
    assert x.grad.tolist() == [[2, 2], [2, 2]]
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        x.data = torch.ones(2, 2, device="meta")


@pytest.mark.parametrize("kind", ["conv", "depthwise", "pointwise", "transposed"])
@pytest.mark.parametrize("moved", ["weight", "input", "both"])
def test_convolutions_keep_the_memory_format_that_cpu_gives(kind, moved):
    torch.manual_seed(1)
    module = {
        "conv": nn.Conv2d(4, 8, 3, stride=2, padding=1),
        "depthwise": nn.Conv2d(4, 8, 3, groups=4),
        "pointwise": nn.Conv2d(4, 8, 1),
        "transposed": nn.ConvTranspose2d(4, 6, 3, 2, groups=2),
    }[kind]
    last = torch.channels_last
    module = module if moved == "input" else module.to(memory_format=last)
    data = torch.randn(2, 4, 9, 9)
    data = data if moved == "weight" else data.contiguous(memory_format=last)

    def run(device):
        net, x = on(device, module, data)
        for _ in range(2):  # the second time from memory
            output = F.batch_norm(net(x), None, None, training=True)
            output.square().sum().backward()
        return [output, *gradients(net, x)]

    assert_same_on_both(run)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.huber_loss])
def test_losses_are_right_when_the_same_shape_comes_again(loss, reduction):
    def run(device):
        x = torch.randn(4, 3).to(device).requires_grad_()
        results = [loss(x, x.detach() * k, reduction=reduction) for k in range(3)]
        sum(r.sum() for r in results).backward()
        return [*results, x.grad]

    assert_same_on_both(run)


def test_statistics_of_a_bfloat16_layer_norm_have_the_type_that_cpu_gives():
    def run(device):
        x = torch.randn(3, 8).to(device, torch.bfloat16).requires_grad_()
        norm = nn.LayerNorm(8).to(device, torch.bfloat16)
        norm(x).square().sum().backward()
        return [*torch.native_layer_norm(x, [8], None, None, 1e-5), *gradients(norm, x)]

    assert_same_on_both(run)


def test_attention_modules_take_the_fast_path_in_eval():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    ends = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)

    @torch.no_grad()
    def run(device):
        net = copy.deepcopy(encoder).to(device)
        x = torch.randn(2, 5, 16).to(device)
        attention = net.layers[0].self_attn
        return [net(x), net(x, src_key_padding_mask=ends.to(device)), *attention(x, x, x),
                attention(x, x, x, need_weights=False)[0]]  # fmt: skip

    assert_same_on_both(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matrix_products_of_expert_layers_run(dtype):
    def run(device):
        x = torch.randn(16, 32).to(device, dtype).requires_grad_()
        w = torch.randn(4, 32, 48).to(device, dtype).requires_grad_()
        ends = torch.tensor([4, 4, 12, 16], dtype=torch.int32, device=device)
        y = torch._grouped_mm(x, w, offs=ends)
        y.float().square().sum().backward()
        return [y, x.grad, w.grad]

    assert_same_on_both(run)


# ---------------------------------------------------------------- sparse and nested


def test_sparse_gradients_of_embeddings_train_as_on_cpu():
    def run(device):
        torch.manual_seed(1)
        table, bag = nn.Embedding(10, 4, sparse=True), nn.EmbeddingBag(10, 4, sparse=True)
        table.to(device), bag.to(device)
        first = torch.optim.SparseAdam([table.weight])
        second = torch.optim.SGD(bag.parameters(), lr=0.1)
        for _ in range(3):
            first.zero_grad(), second.zero_grad()
            rows = torch.tensor([1, 2, 2, 5], device=device)
            for picked in (rows, rows[:2]):  # accumulates a sparse gradient to a sparse one
                table(picked).square().sum().backward()
            bag(rows.view(2, 2)).square().sum().backward()
            first.step(), second.step()
        assert table.weight.grad.is_sparse and table.weight.grad.device.type in device
        return [table.weight, bag.weight, table.weight.grad, table.weight.grad._indices(),
                table.weight.grad.coalesce().values(), bag.weight.grad]  # fmt: skip

    assert_same_on_both(run)


def test_sparse_tensors_move_and_compute():
    def run(device):
        dense = torch.randn(4, 4).relu().to(device)
        coo, csr = dense.to_sparse(), dense.to_sparse_csr()
        back = coo.cpu().to(device)
        grown = torch.sparse_coo_tensor((4, 4), device=device)
        grown.add_(coo).mul_(3)
        return [coo, csr, back, grown, coo @ dense, csr @ dense, coo + coo, (coo * 2).t(),
                torch.sparse.softmax(coo, 1), torch.sparse.sum(coo, 0), csr.values(),
                csr.crow_indices(), coo.transpose(0, 1).coalesce().indices(),
                dense.clone().add_(coo), coo.to_dense()]  # fmt: skip

    assert_same_on_both(run)


def test_sparse_matrices_have_gradients():
    def run(device):
        a = torch.eye(4).to_sparse().to(device).requires_grad_()
        b = torch.randn(4, 3).to(device).requires_grad_()
        torch.sparse.mm(a, b).square().sum().backward()
        return [a.grad, b.grad]

    assert_same_on_both(run)


@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_nested_tensors_move_and_compute():
    def run(device):
        parts = [torch.randn(2, 3), torch.randn(4, 3)]
        nested = torch.nested.nested_tensor(parts).to(device)
        weight = torch.randn(5, 3).to(device)
        return [nested.to_padded_tensor(0.0), F.linear(nested, weight).to_padded_tensor(0.0),
                torch.softmax(nested, -1).to_padded_tensor(0.0), nested.unbind()[1] + 1,
                (nested * 2).cpu().to_padded_tensor(0.0)]  # fmt: skip

    assert_same_on_both(run)


def test_histc_counts_integers_as_cuda_does():
    x = torch.tensor([1, 2, 2, 7], device="vgpu:0")
    assert torch.histc(x, 8, 0, 7).tolist() == [0, 1, 2, 0, 0, 0, 0, 1]


def test_an_operator_without_cpu_kernel_says_its_name_and_what_to_do():
    x = torch.ones(2, 2, device="vgpu:0")
    with pytest.raises(NotImplementedError, match=r"aten::_cslt_compress has no CPU kernel.*Use"):
        torch._cslt_compress(x)
