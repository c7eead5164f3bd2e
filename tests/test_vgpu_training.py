"""Training on the virtual GPU gives CPU's bits: losses, gradients and parameters."""

import copy
import gc
import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harmony.vgpu import api as vgpu

VOCABULARY, WIDTH, HEADS, LENGTH, BATCH = 50, 32, 4, 16, 3


@pytest.fixture(autouse=True)
def gpus():
    gc.collect()
    vgpu.virtual_gpus(count=2, memory="64MiB")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # streams compute with one thread, and sums depend on the number
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
        )

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, targets):
        where = torch.arange(tokens.shape[1], device=tokens.device)
        x = F.dropout(self.embedding(tokens) + self.position(where), 0.1, self.training)
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), targets)


def train(model, device, autocast=False, **options):
    """Return losses and gradients of ten steps, and the parameters after them."""
    model.to(device)
    torch.manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH)).to(device)
    targets = torch.randint(0, VOCABULARY, (BATCH * LENGTH,)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    torch.manual_seed(2)
    seen = []
    for _ in range(10):
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=autocast):
            loss = model(tokens, targets)
        loss.backward()
        seen += [loss.detach().cpu(), *(p.grad.to("cpu", copy=True) for p in model.parameters())]
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return seen + [p.detach().cpu() for p in model.parameters()]


def assert_same(expected, actual):
    assert len(expected) == len(actual)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_gpt_trains_to_the_same_bits_as_on_cpu(autocast, options):
    torch.manual_seed(0)
    model = GPT()
    expected = train(copy.deepcopy(model), "cpu", autocast, **options)
    assert_same(expected, train(model, "vgpu:1", autocast, **options))


def test_with_parameters_and_optimizer_on_the_host():
    torch.manual_seed(0)
    model = GPT()
    there = copy.deepcopy(model).to("vgpu:0")
    tokens, targets = torch.arange(16).view(1, 16), torch.arange(16)
    results = []
    for compute, device in ((model, "cpu"), (there, "vgpu:0")):
        host = [nn.Parameter(p.detach().cpu().clone()) for p in compute.parameters()]
        optimizer = torch.optim.AdamW(host, lr=1e-2)
        for step in range(10):
            torch.manual_seed(step)
            compute(tokens.to(device), targets.to(device)).backward()
            for mine, theirs in zip(host, compute.parameters(), strict=True):
                mine.grad = theirs.grad.to("cpu", copy=True)
            optimizer.step()
            compute.zero_grad()
            with torch.no_grad():
                for mine, theirs in zip(host, compute.parameters(), strict=True):
                    theirs.copy_(mine)
        results.append([p.detach() for p in host])
    assert_same(*results)


@pytest.mark.parametrize("mask", [None, "bool", "float", "requires_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_takes_the_same_kernel_as_on_cpu(mask, dtype):
    data = [torch.randn(2, 4, 9, 8, dtype=dtype) for _ in range(3)]
    bias = torch.randn(9, 9, dtype=dtype)
    results = []
    for device in ("cpu", "vgpu:0"):
        q, k, v = (x.clone().to(device).requires_grad_() for x in data)
        m = None if mask is None else bias.clone().to(device)
        if mask == "bool":
            m = m > 0
        elif mask == "requires_grad":
            m.requires_grad_()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=m)
        y.float().pow(2).sum().backward()
        grads = [x.grad for x in (q, k, v, m) if x is not None and x.grad is not None]
        results.append([x.detach().cpu() for x in (y, *grads)])
    assert_same(*results)


def test_attention_with_dropout():
    data = torch.randn(2, 4, 9, 8)
    results = []
    for device in ("cpu", "vgpu:0"):
        x = data.clone().to(device).requires_grad_()
        torch.manual_seed(0)
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.3, is_causal=True)
        y.sum().backward()
        results.append([y.detach().cpu(), x.grad.cpu()])
    assert_same(*results)


def test_tied_parameters_stay_tied():
    model = GPT().to("vgpu:0")
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.device == torch.device("vgpu:0")
    assert not torch.__future__.get_swap_module_params_on_conversion()


def test_save_and_load_between_devices():
    model = nn.Linear(3, 4).to("vgpu:1")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for device in ("cpu", "vgpu:0", "vgpu:1"):
        file.seek(0)
        state = torch.load(file, map_location=device)
        assert state["weight"].device == torch.device(device)
        assert torch.equal(state["weight"].cpu(), model.weight.detach().cpu())
    file.seek(0)
    assert torch.load(file)["bias"].device == torch.device("vgpu:1")


def test_convolution_network():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.ConvTranspose2d(8, 4, 2), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip

    data, results = torch.randn(2, 3, 8, 8), []
    for device in ("cpu", "vgpu:0"):
        model = network().to(device)
        x = data.clone().to(device).requires_grad_()
        y = model(x)
        y.pow(2).sum().backward()
        grads = [p.grad.cpu() for p in model.parameters()]
        buffers = [b.cpu() for b in model.buffers()]
        results.append([y.detach().cpu(), x.grad.cpu(), *grads, *buffers])
        model.eval()
        results[-1].append(model(x).detach().cpu())
    assert_same(*results)


def test_everyday_things():
    x = torch.arange(6.0, device="vgpu:0").view(2, 3)
    assert "device='vgpu:0'" in repr(x) and x[1, 2].item() == 5
    with pytest.raises(TypeError, match="vgpu"):
        x.numpy()
    with pytest.raises(RuntimeError, match=r"same device.*vgpu:0 and cpu"):
        x + torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"same device.*vgpu:0 and vgpu:1"):
        x + x.to("vgpu:1")
    assert torch.equal((x + torch.tensor(1.0)).cpu(), x.cpu() + 1)
    assert torch.equal(x[x > 2].cpu(), torch.tensor([3.0, 4.0, 5.0]))
    assert x.argmax().item() == 5 and x.is_vgpu and copy.deepcopy(x).device == x.device
    assert torch.histc(torch.tensor([1, 2, 2], device="vgpu:0"), 3, 0, 3).tolist() == [0, 1, 2]


def test_a_backward_before_the_virtual_gpus_were_loaded() -> None:
    """The autograd engine starts its threads at the first backward of the process."""
    script = """
import torch
x = torch.ones(3, requires_grad=True)
(x * 2).sum().backward()
from harmony.vgpu import api as vgpu
vgpu.virtual_gpus(count=2, memory="1MiB")
for device in ("vgpu:1", "vgpu:0"):
    y = torch.ones(3, device=device, requires_grad=True)
    (y * 2).sum().backward()
    assert y.grad.cpu().tolist() == [2.0, 2.0, 2.0]
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "done\n", done.stderr
