"""Steps of Adam, AdamW and SGD by kernels of our own, bit for bit those of the class by default.

`kernels/cpu/` does in one pass over memory what the loop of `torch.optim` does operator by
operator. Whether it computes the same here is tried, once for each kind of step: on values of all
sizes, of any length and alignment. Where it does not, or nothing can be compiled, the class's own
loop runs, with the same results.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmony.core.compiled import Compiled
from harmony.errors import HarmonyError

FORMS = ("generic", "AVX2", "AVX-512")

_KINDS: tuple[type, ...] = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_NESTEROV, _WRITES_GRADIENT, _HALF_GRADIENT, _COUPLED = 1, 2, 4, 8
_PROBED = (1, 7, 8, 31, 67, 1000, 4099)
"""Elements of the parameters of a trial: less than a vector register, its multiples, rests."""

_NUM_ROOTS = 1 << 16
_BLOCK = 256
_FLOATS = ("scale", "sign", "shrink", "decay", "weight1", "beta2", "weight2", "bias2", "epsilon")


class NotCompiledError(HarmonyError):
    """The kernels cannot be built; caught here, since the class's own loop does as well."""


LIBRARY = Compiled(
    "the update kernels",
    "cpu",
    (
        *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra"),
        *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-unswitch-loops"),
    ),
    NotCompiledError,
)


class _Rule(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_int64),
        *((name, ctypes.c_float) for name in (*_FLOATS, "step")),
    )


class _Root(ctypes.Structure):
    _fields_ = (("sqrt", ctypes.c_void_p), ("estimated", ctypes.c_int64))


@dataclass(frozen=True)
class Kernels:
    """The library, and how it computes here.

    Attributes:
        form: index of the best of `FORMS` that the processor has.
        root: how square roots are taken so that they are torch's; None where no way is.
    """

    library: ctypes.CDLL
    form: int
    root: _Root | None


@functools.cache
def kernels() -> Kernels | str:
    """The kernels, built at the first call (5 s) and kept; or why there are none."""
    try:
        library = ctypes.CDLL(str(LIBRARY.path()))
    except (NotCompiledError, OSError) as error:
        return str(error).partition("\n")[0]
    best = int(library.harmony_best_form())
    return Kernels(library, best, _root_like_torch(library, best))


def take_step(
    optimizer: torch.optim.Optimizer, copies: Mapping[int, torch.Tensor], scale: float = 1.0
) -> tuple[set[int], bool]:
    """Take a step for those parameters of an optimizer for which a kernel can.

    Args:
        optimizer: whose groups are left with the other parameters.
        copies: bf16 tensors that get the new values of fp32 parameters, by their identity.
        scale: what gradients are multiplied by, and left as.

    Returns:
        The parameters whose copy has them now; and whether any parameter is left.
    """
    copied: set[int] = set()
    left = False
    for group in optimizer.param_groups:
        chosen = _chosen(optimizer, group)
        if scale != 1.0:  # in bf16 a product is rounded twice
            chosen = [pair for pair in chosen if _is_fp32(pair[0].grad)]
        if chosen:
            _step(type(optimizer), group, chosen, copies, scale)
            done = {id(param) for param, _ in chosen}
            copied |= done & copies.keys()
            group["params"] = [p for p in group["params"] if id(p) not in done]
        left = left or bool(group["params"])
    return copied, left


def own_step(optimizer: torch.optim.Optimizer) -> None:
    """Run the class's own step, without hooks, and without what an LR scheduler wraps it in."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer)


def describe(optimizer: torch.optim.Optimizer) -> str:
    """What takes its steps on the host: a kernel, or why none does; empty where none is meant."""
    asked = [group for group in optimizer.param_groups if _is_default(optimizer, group)]
    if not asked:
        return ""
    found = kernels()
    if isinstance(found, str):
        return f"PyTorch's loop: {found}"
    if all(_same_here(optimizer, group) for group in asked):
        return f"{FORMS[found.form]} kernel"
    return "PyTorch's loop: the kernel computes otherwise here"


def takes_all(optimizer: torch.optim.Optimizer) -> bool:
    """Whether kernels take its steps on the host for all fp32 parameters, once it has a state."""
    if isinstance(kernels(), str):
        return False
    return all(
        _is_default(optimizer, group) and _same_here(optimizer, group)
        for group in optimizer.param_groups
    )


def _is_default(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a group's steps are of a kind that there is a kernel for, in the default form."""
    if type(optimizer) not in _KINDS:
        return False
    if any(group.get(key) for key in ("fused", "foreach", "capturable", "differentiable")):
        return False
    names = ("lr", "eps", "weight_decay", "momentum", "dampening")
    numbers = [group[name] for name in names if name in group] + list(group.get("betas", ()))
    return all(isinstance(number, (int, float)) for number in numbers)


State = dict[str, torch.Tensor]


def _chosen(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> list[tuple[nn.Parameter, State]]:
    """The parameters of a group that a kernel can update, with their state."""
    if not _is_default(optimizer, group) or isinstance(kernels(), str):
        return []
    pairs = ((param, _flat_state(optimizer, group, param)) for param in group["params"])
    found = [(param, state) for param, state in pairs if state is not None]
    return found if found and _same_here(optimizer, group) else []


def _flat_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], param: nn.Parameter
) -> State | None:
    """The state of a parameter that a kernel can update; the class's own first step makes it."""
    held, state = optimizer.state.get(param) or {}, {}
    if param.grad is None or param.grad.dtype not in (torch.float32, torch.bfloat16):
        return None
    if not (_is_flat(param) and _is_flat(param.grad, param.grad.dtype)):
        return None
    for name in _state_names(group):
        value = held.get(name)
        if not isinstance(value, torch.Tensor):
            return None
        if name != "step" and not (_is_flat(value) and value.shape == param.shape):
            return None
        state[name] = value
    return state


def _is_fp32(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dtype is torch.float32


def _is_flat(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a tensor is a range of numbers in the host's memory, and of nobody's own class."""
    return (
        type(tensor).__torch_function__
        in (torch._C._disabled_torch_function_impl, torch.Tensor.__torch_function__)
        and tensor.dtype is dtype
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_inference()
    )


def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """What the class keeps for a parameter, as the kernels take it: first, second, largest."""
    if "betas" not in group:
        return ("momentum_buffer",) if group["momentum"] else ()
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()), "step")


def _step(
    kind: type,
    group: Mapping[str, Any],
    chosen: Sequence[tuple[nn.Parameter, State]],
    copies: Mapping[int, torch.Tensor],
    scale: float,
) -> None:
    found = kernels()
    assert isinstance(found, Kernels), "nobody chooses parameters without kernels"
    calls: dict[tuple[torch.dtype, float], array[int]] = defaultdict(lambda: array("q"))
    for param, state in chosen:
        assert param.grad is not None
        counter = state.pop("step", None)
        step = 0.0 if counter is None else counter.add_(1).item()
        copy = copies.get(id(param))
        tensors = [param, param.grad, *state.values()]
        addresses = [tensor.data_ptr() for tensor in tensors] + [0] * (5 - len(tensors))
        last = (0 if copy is None else copy.data_ptr(), param.numel())
        calls[param.grad.dtype, step].extend((*addresses, *last))
        written = [param.grad] if scale != 1.0 else []
        torch.autograd.graph.increment_version([param, *state.values(), *written])
    is_adam = int(kind is not torch.optim.SGD)
    for (dtype, step), ranges in calls.items():
        rule = _adam_rule(group, step) if is_adam else _sgd_rule(group)
        rule.scale = scale
        rule.flags |= _HALF_GRADIENT if dtype is torch.bfloat16 else 0
        rule.flags |= _WRITES_GRADIENT if scale != 1.0 else 0
        found.library.harmony_step(
            is_adam,
            ctypes.c_void_p(ranges.buffer_info()[0]),
            ctypes.c_int64(len(ranges) // 7),
            ctypes.byref(rule),
            ctypes.byref(found.root or _Root()),
            found.form,
            torch.get_num_threads(),
        )


def _adam_rule(group: Mapping[str, Any], step: float) -> _Rule:
    """The numbers of one step, each rounded where `torch.optim` hands it to an operator."""
    lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    decoupled = bool(group["decoupled_weight_decay"])
    return _Rule(
        flags=_COUPLED if decay != 0 and not decoupled else 0,
        sign=-1.0 if group["maximize"] else 1.0,
        shrink=1 - lr * decay if decay != 0 and decoupled else 1.0,
        decay=decay,
        weight1=1 - beta1,
        beta2=beta2,
        weight2=1 - beta2,
        bias2=(1 - beta2**step) ** 0.5,
        epsilon=group["eps"],
        step=-(lr / (1 - beta1**step)),
    )


def _sgd_rule(group: Mapping[str, Any]) -> _Rule:
    coupled = _COUPLED if group["weight_decay"] != 0 else 0
    return _Rule(
        flags=coupled | (_NESTEROV if group["nesterov"] else 0),
        sign=-1.0 if group["maximize"] else 1.0,
        decay=group["weight_decay"],
        weight1=group["momentum"],
        weight2=1 - group["dampening"],
        step=-group["lr"],
    )


# Whether a kernel computes what the class does


def _root_like_torch(library: ctypes.CDLL, form: int) -> _Root | None:
    """How to take roots that are torch's: MKL's are not all rounded correctly."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0x7F800000, (_NUM_ROOTS,), generator=generator, dtype=torch.int32)
    values = drawn.view(torch.float32).sort().values  # those that are rare stand together
    values[-3:] = torch.tensor([float("inf"), float("nan"), -1.0])
    values[:1] = values[4000] = 0.0
    theirs = _sqrt_of_mkl()
    ways: list[_Root] = [_Root(None, 0)]
    if theirs:
        ways = [*([_Root(theirs, 1)] if form else []), *ways, _Root(theirs, 0)]
    for root in ways:
        found = values.clone()
        for start in range(0, _NUM_ROOTS, _BLOCK):
            address = ctypes.c_void_p(found[start:].data_ptr())
            library.harmony_roots(address, ctypes.c_int64(_BLOCK), ctypes.byref(root), form)
        if _same_bits(found, values.sqrt()):
            return root
    return None


def _sqrt_of_mkl() -> int | None:
    """Address of the function by which torch takes roots, where it is built with MKL."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.vmsSqrt, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _structure(group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What decides which operations a step has, with numbers that stand for all others."""
    found: dict[str, Any] = {
        "lr": 1e-2,
        "weight_decay": 0.1 if group["weight_decay"] else 0.0,
        "maximize": bool(group["maximize"]),
    }
    if "betas" in group:
        found |= {
            "betas": (0.9 if group["betas"][0] > 0.5 else 0.3, 0.99),
            "amsgrad": bool(group["amsgrad"]),
            "decoupled_weight_decay": bool(group["decoupled_weight_decay"]),
        }
    else:
        nesterov = bool(group["nesterov"])
        found |= {
            "momentum": 0.9 if group["momentum"] else 0.0,
            "nesterov": nesterov,
            "dampening": 0.0 if nesterov else 0.25,
        }
    return tuple(sorted(found.items()))


def _same_here(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a kernel computes what steps of this kind do."""
    return _computes_the_same(_KINDS.index(type(optimizer)), *_structure(group))


@functools.cache
def _computes_the_same(index: int, *structure: tuple[str, Any]) -> bool:
    """Whether steps of a kernel leave the bits that the class leaves, tried once for each kind."""
    found, kind = kernels(), _KINDS[index]
    if isinstance(found, str) or (kind is not torch.optim.SGD and found.root is None):
        return False
    ours, theirs = (_trial(kind, dict(structure)) for _ in range(2))
    params = [list(optimizer.param_groups[0]["params"]) for optimizer in (ours, theirs)]
    with torch.no_grad():
        for number in range(5):
            for param, gradient, twin in zip(
                params[0], _gradients(number), params[1], strict=True
            ):
                param.grad, twin.grad = gradient.clone(), gradient
            scale = (1.0, 0.3)[number % 2]
            for twin in params[1]:
                assert twin.grad is not None
                twin.grad.mul_(torch.tensor(scale))
            own_step(theirs)
            if not number:  # the first one makes the state
                own_step(ours)
                continue
            copies = {id(p): torch.empty(p.numel(), dtype=torch.bfloat16) for p in params[0]}
            group = ours.param_groups[0]
            state = [(p, {n: ours.state[p][n] for n in _state_names(group)}) for p in params[0]]
            _step(kind, group, state, copies, scale)
            for param, twin in zip(*params, strict=True):
                names = _state_names(group)
                pairs = [(ours.state[param][n], theirs.state[twin][n]) for n in names]
                pairs += [(param, twin), (copies[id(param)], twin.bfloat16())]
                pairs += [(param.grad, twin.grad)]
                if not all(_same_bits(a, b) for a, b in pairs):
                    return False
    return True


def _trial(kind: Any, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(1)
    # A number behind the start of its memory: no vector register is aligned there.
    params = [nn.Parameter(torch.randn(n + 1, generator=generator)[1:]) for n in _PROBED]
    optimizer: torch.optim.Optimizer = kind(params, lr=0.1, foreach=False)
    optimizer.param_groups[0].update(options)
    return optimizer


def _gradients(number: int) -> Iterator[torch.Tensor]:
    """Gradients of all sizes, whose squares are subnormal, 0, infinite; some are no numbers."""
    generator = torch.Generator().manual_seed(2)
    for size in _PROBED:
        powers = torch.rand(size, generator=generator) * 44 - 24
        drawn = torch.randn(size, generator=generator) * (number + 1) * 10**powers
        if number == 4:
            drawn[::5], drawn[1::13], drawn[2::13] = 0.0, float("inf"), float("nan")
        yield drawn


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are the same; one that is no number is like another."""
    whole = torch.int16 if a.dtype is torch.bfloat16 else torch.int32
    equal = (a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())
    return bool(equal.all())
