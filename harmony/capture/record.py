"""Records a forward as a tape while it runs.

A ``TorchFunctionMode`` sees every torch function, a patched ``nn.Module.__call__`` every call of a
module, a ``TorchDispatchMode`` every kernel (to know who draws random numbers). Inside a leaf
module nothing is recorded, but tensors that come in or go out by another way than the arguments
and the result are noticed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from harmony.capture.isolation import (
    autocast_dtype,
    python_random_states,
    same_random_states,
    user_frame,
)
from harmony.capture.leafwatch import LeafCall, LeafMustOpenError
from harmony.capture.numbering import Numbering
from harmony.capture.refuse import (
    check_argument,
    check_custom,
    check_function,
    check_unknown_tensor,
)
from harmony.capture.skeleton import Skeleton
from harmony.capture.structure import flatten
from harmony.capture.tape import (
    DEVICE,
    Constant,
    Context,
    LeftBehind,
    ModuleRef,
    StateRef,
    Step,
    StepKind,
    TapeValue,
    ValueRef,
)
from harmony.errors import CaptureError

_READS = frozenset({"item", "tolist", "numpy", "is_nonzero", "equal", "allclose"})
_READS |= {"__bool__", "__int__", "__float__", "__index__", "__complex__"}
_READS |= {"__contains__", "__array__"}
_SEEDED = torch.Tag.nondeterministic_seeded


class RandomWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices kernels that draw random numbers.

    Attributes:
        drawn: whether one did since this was last set to False.
    """

    drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _SEEDED in func.tags and _is_on(func, args, kwargs):
            self.drawn = True
        return func(*args, **kwargs)


class Recorder(TorchFunctionMode):
    """Records what runs inside it, on one thread.

    Attributes:
        steps: the calls so far.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        leaves: set[str],
        device: torch.device,
        stand_ins: Mapping[int, Any],
        random: RandomWatch,
    ) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._device = device
        self._leaves = leaves
        self._stand_ins = stand_ins
        self._random = random
        self._thread = threading.get_ident()
        self._busy = False
        self._leaf: LeafCall | None = None
        self._module_names = {id(module): name for name, module in skeleton.modules.items()}
        self._state = {id(skeleton.tensor(name)): name for name in skeleton.names}
        self._constants: dict[int, Constant] = {}
        self._numbers = Numbering()
        self._made_in: dict[int, LeafCall] = {}
        self._alive: list[Any] = []
        self._python_random = python_random_states()

    @property
    def values(self) -> list[TapeValue]:
        """What is known of each numbered tensor."""
        return self._numbers.values

    def add_input(self, tensor: torch.Tensor, name: str) -> int:
        """Number an input of the model."""
        return self._numbers.number(tensor, name)

    def add_output(self, leaf: Any) -> Any:
        """Return the reference to an output; what no step made gets a step that passes it on."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        reference = self._reference(leaf, "the model's output")
        made = {number for step in self.steps for number in step.made}
        if isinstance(reference, ValueRef) and reference.id in made:
            return reference
        passed_on = self._call_function(torch.Tensor.view_as, "output", (leaf, leaf), {})
        return self._reference(passed_on, "the model's output")

    def check_python_random(self) -> None:
        """Refuse randomness of Python or NumPy in the glue: a tape would freeze it."""
        if not same_random_states(self._python_random, python_random_states()):
            raise CaptureError(
                f"the forward draws random numbers of Python or NumPy before {user_frame()}, "
                "outside of a layer: not supported yet. Draw them inside a layer"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if threading.get_ident() != self._thread or self._busy:
            return func(*args, **kwargs)
        if self._leaf is not None:
            return self._leaf.call(func, args, kwargs)
        return self._call_function(func, getattr(func, "__name__", str(func)), args, kwargs)

    def call_module(
        self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Handle a call of a module: a leaf becomes a step, another one is opened."""
        module = self._stand_ins.get(id(module), module)
        name = self._module_names.get(id(module))
        opened = name is None or name not in self._leaves
        elsewhere = threading.get_ident() != self._thread or self._busy or self._leaf is not None
        if opened or elsewhere:
            return call(module, *args, **kwargs)
        assert name is not None
        return self._call_leaf(module, name, call, args, kwargs)

    def call_custom(self, function: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle ``apply`` of a custom ``autograd.Function``: a step, in the glue."""
        if threading.get_ident() != self._thread or self._busy or self._leaf is not None:
            return apply(*args, **kwargs)
        name = f"{function.__name__}.apply"
        check_custom(name, args)
        return self._call_function(apply, name, args, kwargs)

    def _call_function(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        (args, kwargs), leaves, structure = self._stand_in(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        check_function(name, func, bool(tensors))
        if tensors and name in _READS:
            return self._read(func, name, args, kwargs)
        context = _context()
        versions = [_version(tensor) for tensor in tensors]
        drawn, out = self._opaque(lambda: func(*args, **kwargs))
        changed = _changed(tensors, versions)
        made = flatten(out)[0]
        if changed or any(isinstance(leaf, torch.Tensor) for leaf in made):
            for leaf in leaves:
                check_argument(leaf, name)
            references = self._references(leaves, name)
            step = Step(StepKind.FUNCTION, name, func, references, structure, context)
            self._append(step, tensors, changed, made, drawn)
        return out

    def _read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Record a guard: Python looks at the content of a tensor."""
        leaves, structure = flatten((args, kwargs))
        references = self._references(leaves, name)
        _, out = self._opaque(lambda: func(*args, **kwargs))
        step = Step(StepKind.GUARD, name, func, references, structure, _context())
        step.expected, step.where = out, user_frame()
        self.steps.append(step)
        return out

    def _call_leaf(
        self, module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        (args, kwargs), leaves, structure = self._stand_in(args, kwargs)
        for leaf in leaves:
            check_argument(leaf, name)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        references = self._references(leaves, name)
        versions = [_version(tensor) for tensor in tensors]
        watch = LeafCall(name, module, tensors, self._state, self._made_in, self._numbers)
        self.check_python_random()
        self._leaf, self._random.drawn = watch, False
        try:
            out = call(module, *args, **kwargs)
        finally:
            self._leaf = None
        states, self._python_random = self._python_random, python_random_states()
        drawn = self._random.drawn or not same_random_states(states, self._python_random)
        step = Step(StepKind.MODULE, name, name, references, structure, _context())
        step.state = watch.state()
        changed = _changed(tensors, versions)
        self._append(step, tensors, changed, flatten(out)[0], drawn)
        step.left_behind = tuple(
            LeftBehind(
                self._module_names[id(owner)], attribute, self._numbers.number(tensor, name)
            )
            for owner, attribute, tensor in watch.left_behind()
            if id(tensor) not in self._numbers
        )
        return out

    def _append(
        self,
        step: Step,
        tensors: Sequence[torch.Tensor],
        changed: Sequence[torch.Tensor],
        made: Sequence[Any],
        drawn: bool,
    ) -> None:
        used = {self._state[id(tensor)] for tensor in tensors if id(tensor) in self._state}
        step.state = tuple(dict.fromkeys((*step.state, *sorted(used))))
        step.random, step.where = drawn, user_frame()
        step.mutated = tuple(self._renumber(tensor, step) for tensor in changed)
        step.outputs = tuple(self._output(leaf, step.name) for leaf in made)
        self.steps.append(step)

    def _output(self, leaf: Any, name: str) -> int | None:
        """Number a result, unless it is not a tensor or an object that is known already."""
        if not isinstance(leaf, torch.Tensor):
            return None
        if id(leaf) in self._numbers or id(leaf) in self._state or id(leaf) in self._constants:
            return None
        return self._numbers.number(leaf, name)

    def _renumber(self, tensor: torch.Tensor, step: Step) -> tuple[int, int]:
        if id(tensor) not in self._numbers:
            name = self._state.get(id(tensor), "a constant tensor")
            raise CaptureError(
                f"{step.name} at {step.where} changes {name} in place during the forward: "
                "not supported yet"
            )
        return self._numbers.renumber(tensor, step.name)

    def _references(self, leaves: Sequence[Any], user: str) -> tuple[Any, ...]:
        return tuple(self._reference(leaf, user) for leaf in leaves)

    def _reference(self, leaf: Any, user: str) -> Any:
        if isinstance(leaf, torch.device):
            return DEVICE if leaf == self._device else leaf
        if isinstance(leaf, nn.Module) and id(leaf) in self._module_names:
            return ModuleRef(self._module_names[id(leaf)])
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in self._numbers:
            return ValueRef(self._numbers.of(leaf))
        if id(leaf) in self._state:
            return StateRef(self._state[id(leaf)])
        origin = self._made_in.get(id(leaf))
        if origin is not None:
            raise LeafMustOpenError(
                [origin.name], f"a tensor made inside {origin.name} reaches {user} unreturned"
            )
        return self._constant(leaf, user)

    def _constant(self, tensor: torch.Tensor, user: str) -> Constant:
        if id(tensor) not in self._constants:
            check_unknown_tensor(tensor, user, isinstance(tensor, FakeTensor))
            self._constants[id(tensor)] = Constant(tensor.detach())
            self._alive.append(tensor)
        return self._constants[id(tensor)]

    def _stand_in(self, args: Any, kwargs: Any) -> Any:
        """Replace the user's own parameters and modules, reached through a closure, by ours."""
        leaves, structure = flatten((args, kwargs))
        if any(id(leaf) in self._stand_ins for leaf in leaves):
            leaves = [self._stand_ins.get(id(leaf), leaf) for leaf in leaves]
            args, kwargs = structure.unflatten(leaves)
        return (args, kwargs), leaves, structure

    def _opaque(self, call: Callable[[], Any]) -> tuple[bool, Any]:
        """Run without recording; tell whether random numbers were drawn."""
        self._busy, self._random.drawn = True, False
        try:
            out = call()
        finally:
            self._busy = False
        return self._random.drawn, out


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Let the recorder see the calls of modules and custom functions; undone afterwards."""
    call = nn.Module.__call__
    apply = torch.autograd.Function.__dict__["apply"]

    def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_module(module, call, args, kwargs)

    def call_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return recorder.call_custom(cls, apply.__get__(None, cls), args, kwargs)

    setattr(nn.Module, "__call__", call_module)  # noqa: B010
    setattr(torch.autograd.Function, "apply", classmethod(call_apply))  # noqa: B010
    try:
        with recorder:
            yield
    finally:
        setattr(nn.Module, "__call__", call)  # noqa: B010
        setattr(torch.autograd.Function, "apply", apply)  # noqa: B010


def _context() -> Context:
    return Context(torch.is_grad_enabled(), autocast_dtype())


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


def _changed(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> list[torch.Tensor]:
    changed = {
        id(tensor): tensor
        for tensor, version in zip(tensors, versions, strict=True)
        if _version(tensor) != version
    }
    return list(changed.values())


def _is_on(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a random kernel draws: not with ``train=False``, not with ``dropout_p=0``."""
    given = {spec.name: arg for spec, arg in zip(func._schema.arguments, args, strict=False)}
    given |= kwargs
    off = given.get("train") is False or given.get("training") is False
    return not off and given.get("dropout_p") != 0.0
