"""Compares one operator of PyTorch's operator database on the virtual GPU with the CPU.

For ``vgpu_coverage.py`` and the tests. An operator is run on the database's samples as a function,
in place and with ``out=``, forward and backward, and twice, since what the first run of a geometry
finds out is remembered for the second. The function is run once more on the first samples with
inputs and gradients whose elements lie in another order, with gaps, or in one place (`LAYOUTS`).
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

DTYPES = (torch.float32, torch.complex64, torch.int64, torch.int32, torch.uint8, torch.bool,
          torch.float8_e4m3fn)  # fmt: skip
# Arguments besides the first that PyTorch wants on the host, on CUDA too.
TAKES_HOST_ARGUMENTS = {"tensor_split"}

# Layouts of the inputs and of the gradients of the outputs.
LAYOUTS = (("permuted", ""), ("", "permuted"), ("permuted", "permuted"), ("", "expanded"),
           ("gaps", "gaps"))  # fmt: skip
MOST_LAID_OUT = 8
"""Samples of an operator that are run in each of them."""

# What can come of an operator, from good to bad.
MEANING = {
    "identical": "every sample has CPU's bits, forward and backward",
    "tolerance": "CPU itself gives other bits when its memory lies elsewhere; within the"
    " database's tolerance",
    "geometry": "contents are uninitialised memory: shape, strides and type agree",
    "close": "not CPU's bits, but within the database's tolerance",
    "raises": "an error where CPU has none",
    "crash": "the process died or did not end in time",
    "wrong": "another result than CPU's",
    "skipped": "the database has no sample that runs on CPU",
}
GOOD = ("identical", "tolerance", "geometry")


@dataclass
class Verdict:
    """What came of one operator: a key of ``MEANING``, and why if it is not "identical"."""

    name: str
    outcome: str
    reason: str = ""
    num_samples: int = 0
    dtype: str = ""
    took_s: float = 0.0


# ---------------------------------------------------------------- one operator


def database() -> dict[str, Any]:
    """Return PyTorch's operator database: name (and ".variant") -> OpInfo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {full_name(op): op for op in op_db}


def full_name(op: Any) -> str:
    """Return the name of an entry, with its variant if it has one."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def copy_to(t: torch.Tensor, device: str, offset: int = 0) -> torch.Tensor:
    """Copy a tensor with its strides, gaps and overlaps included, to a device.

    ``offset``: elements by which the copy lies behind an aligned address.
    """
    if t.is_conj():
        return copy_to(t.conj(), device, offset).conj()
    if t.is_neg():
        return copy_to(t._neg_view(), device, offset)._neg_view()
    source = t.detach()
    if t.layout != torch.strided or t.is_nested:
        copy = source.clone() if device == "cpu" else source.to(device)
    else:
        extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        extent = extent if t.numel() else 0
        flat = torch.empty(extent + offset, dtype=t.dtype, device=device)
        flat[offset:].copy_(source.as_strided((extent,), (1,)) if extent else source.view(-1)[:0])
        copy = flat.as_strided(t.shape, t.stride(), offset)
    return copy.requires_grad_() if t.requires_grad else copy


def placed(tree: Any, device: str, offset: int = 0) -> Any:
    """Copy a structure of arguments; what names the CPU names the other device."""
    tree = tree_map_only(torch.Tensor, lambda t: copy_to(t, device, offset), tree)
    tree = tree_map_only(torch.device, lambda d: torch.device(device), tree)
    return tree_map_only(str, lambda s: device if s == "cpu" else s, tree)


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same values in another layout: dimensions in reverse order in memory, with gaps.

    "expanded" has the values of one element only. What is not dense and contiguous stays.
    """
    if not layout or t.layout != torch.strided or t.is_nested or not t.is_contiguous():
        return t
    if t.is_conj() or t.is_neg() or t.is_quantized or t.dim() == 0 or t.numel() == 0:
        return t
    with torch.no_grad():
        if layout == "expanded":
            other = t.reshape(-1)[:1].clone().expand(t.shape)
        elif layout == "gaps":
            spaced = torch.zeros((*t.shape[:-1], 2 * t.shape[-1]), dtype=t.dtype)
            other = spaced[..., ::2].copy_(t)
        else:
            order = tuple(reversed(range(t.dim())))
            other = t.permute(order).contiguous().permute(order)
    return other.requires_grad_() if t.requires_grad else other


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of a structure, in order."""
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


@dataclass
class Run:
    """Results of one sample on one device, brought to the host; numbers are kept as they are."""

    outputs: list[Any]
    grads: list[torch.Tensor | None]


def forms(op: Any) -> dict[str, Callable[..., Any]]:
    """Return the ways to call an operator: as a function, in place, and into given outputs."""

    def into_outputs(value: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            result = op(value, *args, **kwargs)
            outputs = tree_map_only(torch.Tensor, torch.zeros_like, result)
            return op(value, *args, **kwargs, out=outputs)

    def in_place(value: Any, *args: Any, **kwargs: Any) -> Any:
        shape = value.shape
        result = op.inplace_variant(value.clone(), *args, **kwargs)
        assert result.shape == shape, "the sample grows its input, which only CPU allows"
        return result

    found: dict[str, Callable[..., Any]] = {"": op}
    if op.inplace_variant is not None:
        found["in place: "] = in_place
    if op.supports_out:
        found["out=: "] = into_outputs
    return found


def run_sample(op: Any, form: Callable[..., Any], sample: Any, device: str,
               offset: int = 0, layouts: tuple[str, str] = ("", "")) -> Run:  # fmt: skip
    """Run an operator and its backward, with the same random numbers on each device."""
    given = (sample.input, sample.args, sample.kwargs)
    given = tree_map_only(torch.Tensor, lambda t: laid_out(t, layouts[0]), given)
    value = placed(given[0], device, offset)
    elsewhere = "cpu" if op.name in TAKES_HOST_ARGUMENTS else device
    args, kwargs = placed(given[1:], elsewhere, offset)
    leaves = [t for t in tensors_in((value, args, kwargs)) if t.requires_grad]
    torch.manual_seed(1)
    result = form(value, *args, **kwargs)
    checked = sample.output_process_fn_grad(result)
    roots = [t for t in tensors_in(checked) if t.requires_grad]
    if roots and leaves and op.supports_autograd:
        generator = torch.Generator().manual_seed(2)
        seeds = [copy_to(laid_out(cotangent(t, generator), layouts[1]), device) for t in roots]
        torch.autograd.backward(roots, seeds)
    outputs = [to_host(x) for x in tree_flatten(result)[0]]
    return Run(outputs, [None if t.grad is None else to_host(t.grad) for t in leaves])


def cotangent(root: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Make a random gradient for an output, on the host."""
    return torch.rand(root.shape, generator=generator, dtype=torch.float64).to(root.dtype) + 0.5


def to_host(value: Any) -> Any:
    """Bring a tensor to the host without changing its strides; other values stay."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if value.device.type == "cpu":
        return value
    return copy_to(value, "cpu") if value.layout == torch.strided else value.cpu()


# ---------------------------------------------------------------- comparing


def parts(t: torch.Tensor) -> list[torch.Tensor]:
    """Return the dense tensors a tensor consists of."""
    if t.is_nested:
        return list(t.unbind())
    if t.layout == torch.sparse_coo:
        return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [t.crow_indices(), t.col_indices(), t.values()]
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [t.ccol_indices(), t.row_indices(), t.values()]
    return [t.to_dense() if t.layout != torch.strided else t]


def geometry(value: Any) -> Any:
    """Return what must agree about a result besides its contents."""
    if not isinstance(value, torch.Tensor):
        return type(value)
    strides: Any = None
    if value.layout == torch.strided and not value.is_nested and value.numel():
        pairs = zip(value.shape, value.stride(), strict=True)
        strides = [s for n, s in pairs if n > 1]
    shape = None if value.is_nested else tuple(value.shape)
    return shape, value.dtype, value.layout, strides, value.is_conj(), value.is_neg()


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two results agree bit for bit; NaNs are all alike."""
    if not isinstance(a, torch.Tensor):
        return bool(a == b) or (a != a and b != b)
    for x, y in zip(parts(a), parts(b), strict=True):
        x, y = x.resolve_conj().resolve_neg(), y.resolve_conj().resolve_neg()
        if x.is_complex():
            x, y = torch.view_as_real(x), torch.view_as_real(y)
        if x.is_quantized:
            x, y = x.int_repr(), y.int_repr()
        if not x.is_floating_point():
            equal = torch.equal(x, y)
        else:
            integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            bits = integer[x.element_size()]
            x, y = x.contiguous(), y.contiguous()
            same = x.view(bits) == y.view(bits)
            equal = bool((same | (x.isnan() & y.isnan())).all())
        if not equal:
            return False
    return True


def tolerance(op: Any, dtype: torch.dtype) -> dict[str, float]:
    """Return the widest tolerance that the database itself grants the operator."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return {"atol": 0.0, "rtol": 0.0}
    widest = {"atol": 1e-5, "rtol": 1.3e-6}
    for decorator in op.decorators:
        for wrapper in getattr(decorator, "decorators", [decorator]):
            for kind, tol in getattr(wrapper, "d", {}).items():
                if kind in (dtype, dtype.to_real()) and hasattr(tol, "atol"):
                    widest["atol"] = max(widest["atol"], tol.atol)
                    widest["rtol"] = max(widest["rtol"], tol.rtol)
    return widest


def difference(a: Any, b: Any) -> float:
    """Return the largest difference, relative to the largest magnitude."""
    if not isinstance(a, torch.Tensor):
        return abs(complex(a) - complex(b))
    worst = 0.0
    for x, y in zip(parts(a), parts(b), strict=True):
        if x.numel() == 0 or x.shape != y.shape:
            continue
        wide = torch.complex128 if x.is_complex() else torch.float64
        x, y = x.to(wide), y.to(wide)
        scale = max(float(x.abs().nan_to_num(0, 0, 0).max()), 1e-30)
        worst = max(worst, float((x - y).abs().nan_to_num(0).max()) / scale)
    return worst


def is_close(op: Any, a: Any, b: Any) -> bool:
    """Return whether two results agree within the tolerance of the database."""
    if not isinstance(a, torch.Tensor):
        return bool(difference(a, b) <= 1e-5)
    pairs = zip(parts(a), parts(b), strict=True)
    return all(
        torch.allclose(x, y, **tolerance(op, x.dtype), equal_nan=True)
        if x.is_floating_point() or x.is_complex()
        else torch.equal(x, y)
        for x, y in pairs
    )


def compare(op: Any, expected: Run, actual: Run, again: Callable[[int], Run]) -> tuple[str, str]:
    """Return the outcome of one sample and the reason; ``again`` repeats the run on CPU."""
    named = [(f"output {i}", a, b) for i, (a, b) in pair(expected.outputs, actual.outputs)]
    named += [(f"gradient {i}", a, b) for i, (a, b) in pair(expected.grads, actual.grads)]
    found = ("identical", "")
    for what, a, b in named:
        if geometry(a) != geometry(b):
            return "wrong", f"{what} is {geometry(b)} instead of {geometry(a)}"
        if a is None or same_bits(a, b):
            continue
        by = f"{what} differs by {difference(a, b):.1e} of its largest value"
        if "empty" in op.name:
            found = ("geometry", MEANING["geometry"])
        elif not is_close(op, a, b):
            return "wrong", by
        else:
            itself = own_difference(a, what, again)
            found = ("tolerance", f"{by}, and on CPU by {itself:.1e} depending on the address of"
                     " its memory") if itself else ("close", by)  # fmt: skip
    return found


def own_difference(value: Any, what: str, again: Callable[[int], Run]) -> float:
    """Return by how much a result on CPU differs when its memory lies elsewhere."""
    index, is_output = int(what.split()[1]), what.startswith("output")
    ballast = []
    for repeat in range(24):
        ballast.append(torch.empty(1000 + 13 * repeat))
        # A thread has a stack and a heap of its own, so even scratch memory moves.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            run = thread.submit(again, repeat % 4).result()
        other = (run.outputs if is_output else run.grads)[index]
        if not same_bits(value, other):
            return difference(value, other)
    return 0.0


def pair(a: Sequence[Any], b: Sequence[Any]) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """Return results in pairs, with their indices."""
    return enumerate(itertools.zip_longest(a, b))


def check(op: Any, num_samples: int | None = None) -> Verdict:
    """Compare one operator of the database, on all its samples or the first ones, on CPU's terms:
    what CPU refuses is left out.
    """
    verdict = Verdict(full_name(op), "skipped", "the database has no sample")
    supported = op.supported_dtypes("cpu")
    dtype = next((d for d in DTYPES if d in supported), None)
    if dtype is None:
        verdict.reason = f"CPU supports {sorted(map(str, supported)) or 'no type'} only"
        return verdict
    verdict.dtype = str(dtype).removeprefix("torch.")
    needs_grad = op.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
    torch.manual_seed(0)
    rank = list(MEANING).index
    samples = op.sample_inputs("cpu", dtype, requires_grad=needs_grad)
    for number, sample in enumerate(itertools.islice(samples, num_samples)):
        for how, form, layouts in ways(op, number):
            try:
                expected = run_sample(op, form, sample, "cpu", layouts=layouts)
            except Exception as error:  # the sample is not for this form, or not for CPU
                if verdict.outcome == "skipped":
                    verdict.reason = "CPU: " + first_line(error)
                continue
            verdict.num_samples += 1
            outcome, reason = check_sample(op, form, sample, expected, layouts)
            if verdict.outcome == "skipped" or rank(outcome) > rank(verdict.outcome):
                verdict.outcome, verdict.reason = outcome, reason and how + reason
    return verdict


def ways(op: Any, number: int) -> Iterator[tuple[str, Callable[..., Any], tuple[str, str]]]:
    """Yield the ways in which to run sample ``number``: a name, the form, the layouts."""
    yield from ((how, form, ("", "")) for how, form in forms(op).items())
    if number < MOST_LAID_OUT:
        for layouts in LAYOUTS:
            inputs, gradients = (layout or "plain" for layout in layouts)
            yield f"{inputs} inputs, {gradients} gradients: ", op, layouts


def check_sample(op: Any, form: Callable[..., Any], sample: Any, expected: Run,
                 layouts: tuple[str, str] = ("", "")) -> tuple[str, str]:  # fmt: skip
    """Compare one sample, twice: the second time what the first one found out is remembered."""

    def again(offset: int) -> Run:
        return run_sample(op, form, sample, "cpu", offset, layouts)

    try:
        for _ in range(2):
            actual = run_sample(op, form, sample, "vgpu:0", layouts=layouts)
            found = compare(op, expected, actual, again)
            if found[0] != "identical":
                break
    except Exception as error:
        if os.environ.get("VGPU_COVERAGE_TRACEBACK"):
            traceback.print_exc()
        return "raises", first_line(error)
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error, with its type."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"
