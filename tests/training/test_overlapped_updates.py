"""Updates that run into the next step: the same bits, and nobody ever sees what is stale."""

from __future__ import annotations

import _thread
import copy
import io
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import harmony
from harmony.engine import late
from harmony.engine.call_key import CallKind
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import Pack, StepSpec, TaskKind
from harmony.planner.search import overlap
from harmony.runtime.exec.stage import Stage
from harmony.runtime.host.host_state import HostState
from tests.training.conftest import VirtualGPUs
from tests.training.models import square_loss, vector_batch
from tests.training.plain import params_of, train_plain
from tests.training.test_plans import use_plan

WIDTH = 24
ADAMW = (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1, "fused": True})
SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True})


@pytest.fixture(autouse=True)
def _all_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions of models as small as these decide nothing here."""
    monkeypatch.setattr(overlap, "CLOSE", float("inf"))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))


def make(net: nn.Module | None = None, **options: Any) -> harmony.Harmony:
    given: dict[str, Any] = {
        "optimizer": ADAMW[0],
        "optimizer_kwargs": ADAMW[1],
        "max_grad_norm": 0.3,
        "loss_fn": square_loss,
        "mode": "pp",
        "devices": 1,
        "microbatch_size": 4,
        "device_memory": "32KiB",
        "updates": "host",
        "replan": False,
        "overlap_updates": True,
    }
    return harmony.Harmony(mlp() if net is None else net, **given | options)


def pair(**options: Any) -> tuple[harmony.Harmony, harmony.Harmony]:
    """A model whose updates overlap, and its twin whose do not."""
    return make(**options), make(**options, overlap_updates=False)


def is_pending(model: harmony.Harmony) -> bool:
    return model._engine.late._left is not None


def state_of(model: harmony.Harmony) -> list[torch.Tensor]:
    """Parameters and the optimizer's state."""
    assert model.optimizer is not None
    states = [model.optimizer.state.get(param, {}) for param in model.parameters()]
    held = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    return [t.detach().clone() for t in (*model.state_dict().values(), *held)]


def same(one: harmony.Harmony, other: harmony.Harmony) -> bool:
    mine, others = state_of(one), state_of(other)
    return len(mine) == len(others) and all(map(torch.equal, mine, others))


def test_a_loss_that_is_not_finite_leaves_the_step_before(vgpus: VirtualGPUs) -> None:
    model, twin = pair(microbatch_size=8, detect_nonfinite=True)
    for each in (model, twin):
        for step in range(2):
            each.train_step(*vector_batch(step))
        inputs, targets = vector_batch(2)
        with pytest.raises(harmony.HarmonyError, match="Nothing was updated"):
            each.train_step(inputs * float("nan"), targets)
    assert same(model, twin)
    for each in (model, twin):
        each.train_step(*vector_batch(3))
    assert is_pending(model)
    assert same(model, twin)


@pytest.mark.parametrize(
    ("factory", "devices", "mode", "max_norm"),
    [
        (ADAMW, 1, "pp", 0.3),
        (ADAMW, 2, "pp", 0.3),
        (ADAMW, 2, "dp", 1e6),
        (SGD, 2, "dp", 0.3),
    ],
)
def test_ten_clipped_steps_are_those_of_plain_pytorch(
    vgpus: VirtualGPUs, factory: Any, devices: int, mode: str, max_norm: float
) -> None:
    batches = [vector_batch(step) for step in range(10)]
    expected = train_plain(
        mlp(),
        batches,
        optimizer=factory[0],
        options=factory[1],
        loss_fn=square_loss,
        microbatch=2,
        shares=devices if mode == "dp" else 1,
        max_norm=max_norm,
    )
    options = {"optimizer": factory[0], "optimizer_kwargs": factory[1], "microbatch_size": 2}
    model = make(**options, devices=devices, mode=mode, max_grad_norm=max_norm)
    losses = [model.train_step(*batch) for batch in batches]
    assert model._engine.late.num_steps == 9, model._engine.late.why_not
    assert model.plan is not None
    assert len(model.plan.spec.late) > 2
    torch.testing.assert_close(losses, expected.losses, rtol=1e-6, atol=0.0)
    found = params_of(model)
    assert all(torch.equal(found[name], expected.params[name]) for name in expected.params)


def test_without_clipping_the_last_updates_run_into_the_next_step(vgpus: VirtualGPUs) -> None:
    batches = [vector_batch(step) for step in range(10)]

    def spec_of(num_layers: int, minibatch: int) -> StepSpec:
        last = tuple(Pack(i, i + 1) for i in range(num_layers))
        first = (Pack(0, 2), *last[2:-1])  # packs of FORWARD need not be those of updates
        shares = ((0, minibatch),)
        return StepSpec(minibatch, 4, 4, first, last, shares, late=last[:3])

    model = make(optimizer=SGD[0], optimizer_kwargs=SGD[1], max_grad_norm=None)
    use_plan(model, batches[0], spec_of, Policy())
    for batch in batches:
        model.train_step(*batch)
    assert model._engine.late.num_steps == 9
    expected = train_plain(
        mlp(),
        batches,
        optimizer=SGD[0],
        options=SGD[1],
        loss_fn=square_loss,
        microbatch=4,
    )
    found = params_of(model)
    assert all(torch.equal(found[name], expected.params[name]) for name in expected.params)


def weight(model: harmony.Harmony) -> nn.Parameter:
    found = model.module[0].weight  # type: ignore[index]
    assert isinstance(found, nn.Parameter)
    return found


def state(model: harmony.Harmony) -> Any:
    assert model.optimizer is not None
    return model.optimizer.state


def pickled(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def changed(change: Callable[[harmony.Harmony], Any]) -> Callable[[harmony.Harmony], Any]:
    """An access that changes something, and then all parameters."""

    def run(model: harmony.Harmony) -> Any:
        with torch.no_grad():
            change(model)
        return [param.detach().clone() for param in model.parameters()]

    return run


def equal(one: Any, other: Any) -> bool:
    """Whether two results are the same bits, in whatever containers."""
    mine, others = tree_leaves(one), tree_leaves(other)
    return len(mine) == len(others) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(mine, others, strict=True)
    )


ACCESSES: dict[str, Callable[[harmony.Harmony], Any]] = {
    "printing": lambda m: str(weight(m)),
    "indexing": lambda m: weight(m)[0, 0].item(),
    "a slice set": changed(lambda m: weight(m).__setitem__(0, 1.0)),
    "arithmetic": lambda m: (weight(m) * 2).detach(),
    "matmul": lambda m: torch.ones(1, WIDTH) @ weight(m).detach().t(),
    "a comparison": lambda m: (weight(m) > 0).sum(),
    "detach": lambda m: weight(m).detach().clone(),
    "data": lambda m: weight(m).data.clone(),
    "data set": changed(lambda m: setattr(weight(m), "data", torch.ones(WIDTH, WIDTH))),
    "grad": lambda m: weight(m).grad.clone(),  # type: ignore[union-attr]
    "grad set": changed(lambda m: setattr(weight(m), "grad", None)),
    "numpy": lambda m: float(weight(m).detach().numpy().sum()),
    "tolist": lambda m: weight(m).tolist(),
    "data_ptr": lambda m: (weight(m).data_ptr(), weight(m).detach().clone())[1],
    "storage": lambda m: weight(m).untyped_storage().tolist(),
    "an in-place operation": changed(lambda m: weight(m).mul_(0.5)),
    "an initialisation": changed(lambda m: nn.init.ones_(weight(m))),
    "copy_": changed(lambda m: weight(m).copy_(torch.ones(WIDTH, WIDTH))),
    "requires_grad set": changed(lambda m: setattr(weight(m), "requires_grad", True)),
    "a norm of all": lambda m: nn.utils.get_total_norm(list(m.parameters())),
    "a vector of all": lambda m: nn.utils.parameters_to_vector(m.parameters()).detach().clone(),
    "a loop over names": lambda m: [p.sum().item() for _, p in m.named_parameters()],
    "foreach": lambda m: torch._foreach_norm(list(m.parameters())),
    "stack": lambda m: torch.stack([p.sum() for p in m.parameters()]).detach(),
    "deepcopy": lambda m: copy.deepcopy(weight(m)).detach(),
    "deepcopy of the module": lambda m: [p.detach() for p in copy.deepcopy(m.module).parameters()],
    "copy": lambda m: copy.copy(weight(m)).detach().clone(),
    "pickle": lambda m: pickle.loads(pickle.dumps(weight(m))).detach(),
    "torch.save": lambda m: pickled(weight(m)).detach(),
    "state_dict": lambda m: pickled(m.state_dict()),
    "the module's state_dict": lambda m: pickled(m.module.state_dict()),
    "load_state_dict": changed(
        lambda m: m.load_state_dict({n: t * 2 for n, t in m.state_dict().items()})
    ),
    "a layer by itself": lambda m: nn.functional.linear(torch.ones(1, WIDTH), weight(m)).detach(),
    "inference": lambda m: m.eval()(torch.ones(8, WIDTH)).detach().clone(),
    "the optimizer's state": lambda m: state(m)[weight(m)]["exp_avg"].clone(),
    "the optimizer's step count": lambda m: state(m)[weight(m)]["step"].item(),
    "the optimizer's state_dict": lambda m: sorted(
        pickled(m.optimizer.state_dict())["state"].items()
    ),  # type: ignore[union-attr]
    "the optimizer's attributes": lambda m: vars(m.optimizer)["state"][weight(m)]["exp_avg"].sum(),
    "zero_grad": changed(lambda m: m.optimizer.zero_grad()),  # type: ignore[union-attr]
    "the optimizer's state cleared": changed(lambda m: m.optimizer.state.clear()),  # type: ignore[union-attr]
    "synchronize": lambda m: m.synchronize(),
    "a fork": lambda m: late._before_fork(),
    "hooks": changed(lambda m: weight(m).register_hook(lambda g: g).remove()),
    "a parameter made of it": lambda m: nn.Parameter(weight(m)).detach().clone(),
    "swapped with another": changed(
        lambda m: torch.utils.swap_tensors(weight(m), nn.Parameter(torch.ones(WIDTH, WIDTH)))
    ),
    "a group of its own": changed(lambda m: in_its_own_group(m.optimizer)),
}


def in_its_own_group(optimizer: Any) -> None:
    """Move the last parameter, whose update is pending, to a group with another rate."""
    last = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [last], "lr": 0.5})


def test_whatever_looks_at_the_model_sees_the_step_done(vgpus: VirtualGPUs) -> None:
    """Each access to the model with pending updates gives what its serial twin gives."""
    model, twin = pair(microbatch_size=8)
    wrong = []
    for step, (name, access) in enumerate(ACCESSES.items()):
        for each in (model, twin):
            each.train()
            each.train_step(*vector_batch(step))
        if not is_pending(model):
            wrong.append(f"{name}: nothing was pending, {model._engine.late.why_not}")
        found, expected = access(model), access(twin)
        if is_pending(model):
            wrong.append(f"{name}: it does not wait")
        if not equal(found, expected) or not same(model, twin):
            wrong.append(f"{name}: it sees something else")
    assert wrong == []


def test_what_asks_for_no_value_leaves_updates_pending(vgpus: VirtualGPUs) -> None:
    model = make(microbatch_size=8)
    model.train_step(*vector_batch(0))
    names = [name for name, param in model.named_parameters() if isinstance(param, nn.Parameter)]
    assert len(names) == len({id(param) for param in model.parameters()}) == 12
    assert weight(model).shape == (WIDTH, WIDTH)
    assert weight(model).dtype is torch.float32
    assert weight(model).requires_grad
    assert type(weight(model)).__name__ == "Parameter"
    assert sum(param.numel() for param in model.parameters()) == 6 * WIDTH * (WIDTH + 1)
    optimizer = model.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert is_pending(model)
    model.synchronize()
    assert type(weight(model)) is nn.Parameter
    assert type(optimizer) is torch.optim.AdamW


def test_pending_updates_take_the_learning_rate_of_their_own_step(vgpus: VirtualGPUs) -> None:
    model, twin = pair()
    for each in (model, twin):
        assert each.optimizer is not None
        schedule = torch.optim.lr_scheduler.OneCycleLR(each.optimizer, 0.1, total_steps=10)
        for step in range(5):
            each.train_step(*vector_batch(step))
            schedule.step()
    assert model._engine.late.num_steps == 4
    assert same(model, twin)


def test_memory_that_somebody_holds_keeps_updates_in_their_step(vgpus: VirtualGPUs) -> None:
    model, twin = pair(microbatch_size=8)
    for each in (model, twin):
        each.train_step(*vector_batch(0))
    held: list[tuple[Any, Any]] = [
        (weight(model).untyped_storage(), weight(twin).untyped_storage()),
        (weight(model).detach(), weight(twin).detach()),
        (weight(model).detach().numpy(), weight(twin).detach().numpy()),
        (state(model)[weight(model)]["exp_avg"], state(twin)[weight(twin)]["exp_avg"]),
        (state(model)[weight(model)]["exp_avg"][0], state(twin)[weight(twin)]["exp_avg"][0]),
    ]
    for step in range(len(held)):
        mine, others = held.pop()
        for each in (model, twin):
            each.train_step(*vector_batch(1 + step))
        assert not is_pending(model)
        assert "holds" in str(model._engine.late.why_not)
        assert mine.tolist() == others.tolist()
        del mine, others
    model.train_step(*vector_batch(9))
    assert is_pending(model)


def test_a_step_that_fails_leaves_the_step_before(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = pair()
    for each in (model, twin):
        for step in range(2):
            each.train_step(*vector_batch(step))

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a GPU burns")

    for name in ("_run", "gather"):  # of a forward, and of a backward
        with monkeypatch.context() as patch:
            patch.setattr(Stage, name, fail)
            with pytest.raises(harmony.HarmonyError, match="a GPU burns"):
                model.train_step(*vector_batch(2))
        assert same(model, twin)
        for each in (model, twin):
            each.train_step(*vector_batch(2))
    assert same(model, twin)


def test_ctrl_c_between_pending_updates_leaves_one_step(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    model, twin = pair()
    for each in (model, twin):
        each.train_step(*vector_batch(0))
    update = HostState.update_late

    def interrupted(self: HostState, *args: Any) -> None:
        _thread.interrupt_main()
        monkeypatch.undo()
        update(self, *args)

    monkeypatch.setattr(HostState, "update_late", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.train_step(*vector_batch(1))
    signal.signal(signal.SIGINT, before)
    twin.train_step(*vector_batch(1))
    assert same(model, twin)


def test_an_update_that_fails_is_said_to_have_torn_the_model(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for access in (lambda m: m.train_step(*vector_batch(1)), lambda m: str(weight(m))):
        model = make(microbatch_size=8)
        saved = copy.deepcopy(model.module.state_dict())
        for step in range(2):
            model.train_step(*vector_batch(step))
        with monkeypatch.context() as patch:
            patch.setattr(HostState, "update_late", lambda *_: 1 / 0)
            with pytest.raises((harmony.HarmonyError, ZeroDivisionError), match="zero"):
                access(model)
        with pytest.raises(harmony.HarmonyError, match="load a checkpoint"):
            model.train_step(*vector_batch(1))
        model.load_state_dict(saved)
        with pytest.warns(harmony.HarmonyWarning, match="optimizer's"):
            model.train_step(*vector_batch(1))


def test_a_checkpoint_with_updates_pending_is_of_the_whole_step(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    model, twin = pair(microbatch_size=8)
    for each in (model, twin):
        for step in range(2):
            each.train_step(*vector_batch(step))
    assert is_pending(model)
    model.save_checkpoint(tmp_path)
    other = make(microbatch_size=8)
    other.load_checkpoint(tmp_path)
    for each in (model, twin, other):
        each.train_step(*vector_batch(2))
    assert same(other, twin)
    assert same(model, twin)
    assert is_pending(make_pending(model))
    model.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    assert same(model, other)


def make_pending(model: harmony.Harmony) -> harmony.Harmony:
    model.train_step(*vector_batch(3))
    return model


def test_hooks_that_come_while_updates_are_pending_hear_of_their_steps_only(
    vgpus: VirtualGPUs,
) -> None:
    model, twin = pair(microbatch_size=8)
    heard: dict[harmony.Harmony, list[str]] = {model: [], twin: []}
    for each in (model, twin):
        each.train_step(*vector_batch(0))
        assert each.optimizer is not None
        handle = each.optimizer.register_step_post_hook(
            lambda *_, each=each: heard[each].append("step")
        )
        each.train_step(*vector_batch(1))
        handle.remove()
        each.train_step(*vector_batch(2))
        weight(each).register_hook(lambda g, each=each: heard[each].append("hook") or g * 2)
        each.train_step(*vector_batch(3))
    assert heard[model] == heard[twin] == ["step", "hook"]
    assert same(model, twin)


def test_masters_in_fp32_are_updated_late_as_well(vgpus: VirtualGPUs) -> None:
    model, twin = pair(precision="bf16")
    for step in range(4):
        for each in (model, twin):
            each.train_step(*vector_batch(step))
        if step == 2:
            for each in (model, twin):
                with torch.no_grad():
                    weight(each).mul_(0.5)
    assert model._engine.late.num_steps == 2
    assert same(model, twin)


class Branching(nn.Module):
    """Goes another way for other values that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(), mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.first(x)
        return self.second(made) if made.abs().max() < 5.0 else self.second(made * 0.1)


def test_a_forward_that_goes_another_way_finds_all_updates_made(vgpus: VirtualGPUs) -> None:
    options = {"device_memory": "1MiB", "microbatch_size": 8}
    model, twin = make(Branching(), **options), make(Branching(), **options, overlap_updates=False)
    for step in range(5):
        for each in (model, twin):
            inputs, targets = vector_batch(step)
            each.train_step(inputs * (1000.0 if step == 3 else 1.0), targets)
    assert model._engine.late.num_steps > 0
    assert same(model, twin)


def test_other_batches_and_replaced_layers_find_all_updates_made(vgpus: VirtualGPUs) -> None:
    model, twin = pair(microbatch_size=4)
    for each in (model, twin):
        each.train_step(*vector_batch(0))
        each.train_step(*vector_batch(1, num_samples=4))
        each.train_step(*vector_batch(2))
        kept = weight(each)
        with torch.no_grad():
            each.module[2].weight = nn.Parameter(torch.ones(WIDTH, WIDTH))  # type: ignore[index]
        assert each.optimizer is not None
        each.optimizer.add_param_group({"params": [each.module[2].weight]})  # type: ignore[index]
        each.train_step(*vector_batch(3))
        assert kept is weight(each)
    assert same(model, twin)


def test_a_model_that_is_closed_or_gone_leaves_the_module_updated(vgpus: VirtualGPUs) -> None:
    twin = make(microbatch_size=8, overlap_updates=False)
    twin.train_step(*vector_batch(0))
    closed, gone = make(microbatch_size=8), make(microbatch_size=8)
    nets = closed.module, gone.module
    for each in (closed, gone):
        each.train_step(*vector_batch(0))
    closed.close()
    copied = copy.deepcopy(gone)
    make_pending(copied).close()
    twin_2 = make_pending(twin).module
    assert torch.equal(copied.module[0].weight, twin_2[0].weight)  # type: ignore[index]
    expected = make(microbatch_size=8, overlap_updates=False)
    expected.train_step(*vector_batch(0))
    gone.train_step(*vector_batch(3))
    expected_1 = expected.module[0].weight.detach().clone()  # type: ignore[index]
    expected.train_step(*vector_batch(3))
    del gone, each
    assert type(nets[1][0].weight) is nn.Parameter  # type: ignore[index]
    assert torch.equal(nets[0][0].weight, expected_1)  # type: ignore[index]
    assert torch.equal(nets[1][0].weight, expected.module[0].weight)  # type: ignore[index]


def test_a_step_of_all_parameters_at_once_is_not_left(vgpus: VirtualGPUs) -> None:
    """An optimizer that cannot be stepped pack by pack has no updates to leave."""

    class Centred(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            params = [p for group in self.param_groups for p in group["params"]]
            mean = torch.stack([p.grad.mean() for p in params]).mean()
            for param in params:
                param.grad.sub_(mean)
            return super().step(closure)

    options = {"optimizer": Centred, "optimizer_kwargs": {"lr": 0.1}, "microbatch_size": 8}
    model, twin = pair(**options)
    for step in range(2):
        for each in (model, twin):
            each.train_step(*vector_batch(step))
    assert model.plan is not None
    assert model.plan.spec.late == ()
    assert same(model, twin)


def test_the_plan_says_what_it_leaves(vgpus: VirtualGPUs) -> None:
    model = make(microbatch_size=8)
    model.train_step(*vector_batch(0))
    plan = model.plan
    assert plan is not None
    decision = next(d for d in plan.decisions if d.name == overlap.NAME)
    assert "in the next step" in decision.chosen
    assert "updates" in decision.why
    assert any("own step" in what for what, _ in decision.alternatives)
    kinds = [step.task.kind for step in plan.schedule.host if step.task is not None]
    count = len(plan.spec.late)
    assert kinds == [TaskKind.LATE_UPDATE] * count + [TaskKind.NORMS] * count
    assert harmony.Plan.from_json(plan.to_json()).spec == plan.spec
    engine = model._engine
    planned = engine.variants.ready(
        CallKind.TRAIN_STEP, ((vector_batch(0)[0],), {}, vector_batch(0)[1])
    ).planned
    assert replace(planned.plan.spec, late=()) != planned.plan.spec
