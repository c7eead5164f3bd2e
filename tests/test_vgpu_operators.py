"""About a hundred operators, forward and backward, give CPU's bits on the virtual GPU."""

import gc

import pytest
import torch
import torch.nn.functional as F

from harmony.vgpu import api as vgpu

NAMES = """
abs acos asin atan ceil cos cosh erf erfc exp expm1 floor frac lgamma log log10 log1p log2
neg reciprocal relu round rsqrt sigmoid sign sin sinh sqrt square tan tanh trunc logit
cumsum:0 cumprod:0 logcumsumexp:0 softmax:1 log_softmax:1 logsumexp:1 mean sum prod std var
norm amax:1 amin:1 max min median sort argmax:1 flip:0 roll:1 tril triu diag diagonal t
contiguous clone flatten unsqueeze:0 squeeze chunk:2 split:2 unbind any all nonzero
argsort count_nonzero isnan isfinite nan_to_num trace inverse det
"""
UNARY = NAMES.split()

BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "mm": torch.mm, "matmul": torch.matmul, "maximum": torch.maximum, "minimum": torch.minimum,
    "atan2": torch.atan2, "lerp": lambda x, y: torch.lerp(x, y, 0.3), "where": lambda x, y:
    torch.where(x > y, x, y), "cat": lambda x, y: torch.cat([x, y]), "stack": lambda x, y:
    torch.stack([x, y]), "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y + 1), "einsum": lambda x, y:
    torch.einsum("ij,kj->ik", x, y), "baddbmm": lambda x, y: torch.baddbmm(x[None], x[None],
    y[None]), "outer": lambda x, y: torch.outer(x[0], y[0]), "cdist": torch.cdist,
    "mse_loss": F.mse_loss, "l1_loss": F.l1_loss, "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss, "kl_div": lambda x, y: F.kl_div(x, y, reduction="batchmean"),
    "binary_cross_entropy": lambda x, y: F.binary_cross_entropy(x * 0.5, y * 0.5),
    "bce_with_logits": F.binary_cross_entropy_with_logits, "cosine_similarity":
    F.cosine_similarity, "bilinear": lambda x, y: F.bilinear(x, y, y[None]), "prelu": lambda x, y:
    F.prelu(x - y, y[0, :1]), "linear": F.linear,
}  # fmt: skip

INDEX = torch.tensor([0, 3, 3, 1])
NETWORK = {
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    "mish": F.mish, "elu": F.elu, "softplus": F.softplus, "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu, "glu": lambda x: F.glu(x, 1), "normalize": F.normalize,
    "layer_norm": lambda x: F.layer_norm(x, (4,)), "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "group_norm": lambda x: F.group_norm(x[None], 2), "batch_norm": lambda x:
    F.batch_norm(x, None, None, training=True), "cross_entropy": lambda x:
    F.cross_entropy(x, INDEX.to(x.device)), "nll_loss": lambda x:
    F.nll_loss(x, INDEX.to(x.device)), "embedding": lambda x: F.embedding(INDEX.to(x.device), x),
    "gather": lambda x: x.gather(1, INDEX.to(x.device)[:, None]), "index_select": lambda x:
    x.index_select(0, INDEX.to(x.device)), "index": lambda x: x[INDEX.to(x.device)],
    "host_index": lambda x: x[INDEX], "mask": lambda x: x[x > 0.5], "masked_fill": lambda x:
    x.masked_fill(x > 0.5, 2.0), "scatter_add": lambda x:
    x.scatter_add(0, INDEX.to(x.device)[None], x[:1]),
    "index_add": lambda x: x.index_add(0, INDEX.to(x.device), x),
    "index_put": lambda x: x.index_put((INDEX.to(x.device),), x, accumulate=True),
    "topk": lambda x: x.topk(2)[0],
    "one_hot": lambda x: F.one_hot(INDEX.to(x.device)), "pad": lambda x: F.pad(x, (1, 2)),
    "conv1d": lambda x: F.conv1d(x[None], x[:, :, None]), "max_pool": lambda x:
    F.max_pool1d(x[None], 2), "avg_pool": lambda x: F.avg_pool1d(x[None], 2), "interpolate":
    lambda x: F.interpolate(x[None], scale_factor=2), "unfold": lambda x: x.unfold(1, 2, 1),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 2)), "fft": lambda x: torch.fft.fft(x).abs(),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(4, device=x.device)),
    "unique": lambda x: x.detach().unique(),
    "qr": lambda x: torch.linalg.qr(x)[1], "clamp": lambda x: x.clamp(0.3, 0.6), "expand": lambda
    x: x[None].expand(3, 4, 4) * 2, "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([0.3, 0.6], device=x.device)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def gpus():
    gc.collect()
    vgpu.virtual_gpus(count=2, memory="64MiB")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors_of(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def outcome(function, device, *data):
    """Return results of a function and gradients of its arguments, on the host, and strides."""
    arguments = [x.clone().to(device).requires_grad_() for x in data]
    results = tensors_of(function(*arguments))
    smooth = [y for y in results if y.requires_grad]
    if smooth:
        torch.autograd.backward([y.sum() for y in smooth])
    grads = [x.grad for x in arguments if x.grad is not None]
    return [(x.detach().cpu(), x.stride()) for x in (*results, *grads)]


def assert_same_as_cpu(function, *data):
    expected, actual = (outcome(function, device, *data) for device in ("cpu", "vgpu:0"))
    assert len(expected) == len(actual)
    for (a, strides), (b, other_strides) in zip(expected, actual, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and strides == other_strides
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def matrix(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 4, generator=generator).to(dtype) * 0.9 + 0.05


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    method, _, argument = name.partition(":")
    arguments = [int(argument)] if argument else []
    assert_same_as_cpu(lambda x: getattr(x, method)(*arguments), matrix(0))


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    assert_same_as_cpu(BINARY[name], matrix(1), matrix(2))


@pytest.mark.parametrize("name", NETWORK)
def test_network(name):
    assert_same_as_cpu(NETWORK[name], matrix(3))


@pytest.mark.parametrize("name", ["mm", "add", "cat", "linear", "mse_loss"])
def test_bfloat16(name):
    assert_same_as_cpu(BINARY[name], matrix(4, torch.bfloat16), matrix(5, torch.bfloat16))


def test_in_place_and_out():
    x = torch.ones(4, device="vgpu:0")
    view = x[1:3]
    view.add_(1).mul_(2)
    out = torch.empty(0, device="vgpu:0")
    torch.add(x, 1, out=out)
    assert x.tolist() == [1, 4, 4, 1] and out.tolist() == [2, 5, 5, 2]
    x.resize_(6)[4:] = 0
    assert x.tolist() == [1, 4, 4, 1, 0, 0]


def test_scalars_of_the_host_are_read_when_enqueued():
    x, number = torch.ones(4, device="vgpu:0"), torch.tensor(2.0)
    torch.accelerator.synchronize(0)
    with vgpu.held(torch.accelerator.current_stream(0)):
        y = x * number
        number.fill_(100)
    assert y.tolist() == [2, 2, 2, 2]
