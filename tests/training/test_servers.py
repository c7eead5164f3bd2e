"""Several processes train one model: the bits of plain PyTorch that adds up their gradients."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import harmony
from harmony.engine.peers import HEADER_NBYTES
from harmony.runtime import hardware, processes
from harmony.runtime.host import limits
from harmony.runtime.host.host_state import HostState
from harmony.runtime.peers.chunks import cut
from harmony.runtime.peers.exchange import MARK_NBYTES, TEXT_NBYTES
from tests import devices
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, square_loss, token_batch, token_loss, vector_batch
from tests.training.plain import params_of
from tests.training.servers import ENDED, on_servers

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "foreach": False}
pytestmark = devices.virtual_only("its processes set them up")

Parts = Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]


def model_of(net: nn.Module, **options: Any) -> harmony.Harmony:
    """A model of this process and all others."""
    given = {"optimizer": torch.optim.AdamW, "optimizer_kwargs": ADAMW, "seed": 0, "devices": 1}
    given |= {"process_group": dist.group.WORLD, "loss_fn": token_loss, **options}
    return harmony.Harmony(net, **{k: v for k, v in given.items() if v is not None})


def batches_for(size: int, steps: int, samples: int = 4) -> Parts:
    return [[token_batch(10 * step + r, samples) for r in range(size)] for step in range(steps)]


def plain_step(
    net: nn.Module, parts: Sequence[Any], step: int, microbatch: int, loss_fn: Any = token_loss
) -> None:
    """Leave as ``grad`` what the processes accumulate, added up in their order, and divided."""
    index, sums = 0, []
    for inputs, targets in parts:
        net.zero_grad()
        for low in range(0, len(inputs), microbatch):
            x, y = inputs[low : low + microbatch], targets[low : low + microbatch]
            harmony.seed_microbatch(step, index, 0)
            (loss_fn(net(x), y) * (len(x) / len(inputs))).backward()
            index += 1
        sums.append([param.grad for param in net.parameters()])
    for param, total, *others in zip(net.parameters(), *sums, strict=True):
        if total is None:
            continue
        for other in others:
            total += other
        param.grad = total / len(parts)


def other(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in expected if not torch.equal(found[name], expected[name])]


# What runs in each process


def steps(rank: int, size: int) -> Any:
    """Clipped steps with dropout, from process 0's values, two microbatches in each process."""
    torch.manual_seed(0)
    expected, batches = GPT(dropout=0.1, depth=2), batches_for(size, 3 if size == 2 else 2)
    net = copy.deepcopy(expected)
    if rank:
        torch.nn.init.ones_(net.head.weight)
    opt = torch.optim.AdamW(expected.parameters(), **ADAMW)
    model = model_of(
        net,
        microbatch_size=2,
        devices=2 if size == 2 else 1,
        device_memory="300KiB",
        max_grad_norm=0.5,
        seed=rank,
    )
    for step, parts in enumerate(batches):
        model.train_step(*parts[rank])
        plain_step(expected, parts, step, 2)
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        opt.step()
    return other(params_of(net), params_of(expected)), sent_by(model, parts[rank])


def sent_by(model: harmony.Harmony, batch: Any) -> tuple[int, int]:
    """Bytes that a step sends, and what the formula says of it."""
    peers = model._engine.peers
    assert peers is not None
    size, before = peers.group.size, peers.group.sent_nbytes
    model.train_step(*batch)
    params = list(model.parameters())
    chunks = cut([("", p.numel(), p.dtype) for p in params])
    gradients = sum(2 * (size - 1) * -(-c.numel // size) * 4 for c in chunks)
    assert abs(gradients - 2 * 4 * sum(p.numel() for p in params) * (size - 1) / size) < 8 * size
    marks = (size - 1) * MARK_NBYTES * len(chunks)
    said = (size - 1) * (HEADER_NBYTES + 2 * (TEXT_NBYTES + 2 * len(params)))
    return peers.group.sent_nbytes - before, gradients + marks + said


def small_chunks(rank: int, size: int) -> Any:
    """Own loop, whose gradients are cut into many chunks, some in the middle of a parameter."""
    torch.manual_seed(0)
    expected, batches = GPT(dropout=0.1, depth=1), batches_for(size, 2)
    net = copy.deepcopy(expected)
    model = model_of(net, optimizer=None, optimizer_kwargs=None, loss_fn=None, microbatch_size=2)
    opts = [torch.optim.AdamW(n.parameters(), **ADAMW) for n in (net, expected)]
    peers = model._engine.peers
    assert peers is not None
    trained = [(n, p.numel(), p.dtype) for n, p in reversed(list(net.named_parameters()))]
    peers._chunks = tuple(trained), cut(trained, 1000)
    assert len(peers._chunks[1]) > 50
    for step, parts in enumerate(batches):
        opts[0].zero_grad()
        token_loss(model(parts[rank][0]), parts[rank][1]).backward()
        plain_step(expected, parts, step, 2)
        for opt in opts:
            opt.step()
    return other(params_of(net), params_of(expected))


def accumulates(rank: int, size: int) -> Any:
    """Backwards in no_sync add up what the next one averages, also one of two forwards."""
    torch.manual_seed(0)
    net = GPT(dropout=0.1, depth=1)
    expected = copy.deepcopy(net)
    model = model_of(net, optimizer=None, optimizer_kwargs=None, loss_fn=None, microbatch_size=4)
    opts = [torch.optim.AdamW(n.parameters(), **ADAMW) for n in (net, expected)]
    peers, count, quiet = model._engine.peers, 0, []
    assert peers is not None
    for _ in range(2):
        parts = batches_for(size, 4)
        opts[0].zero_grad()
        for inputs, targets in (each[rank] for each in parts[:2]):
            before = peers.group.sent_nbytes
            with model.no_sync():
                loss = token_loss(model(inputs), targets)
            loss.backward()
            quiet.append(peers.group.sent_nbytes - before - (size - 1) * HEADER_NBYTES)
        sum(token_loss(model(x), y) for x, y in (each[rank] for each in parts[2:])).backward()
        sums = []
        for r in range(size):
            expected.zero_grad()
            losses = []
            for index, each in enumerate(parts):
                harmony.seed_microbatch(count + index, r, 0)
                losses.append(token_loss(expected(each[r][0]), each[r][1]))
                if index != 2:
                    sum(losses).backward()
                    losses.clear()
            sums.append([param.grad for param in expected.parameters()])
        for param, total, *others in zip(expected.parameters(), *sums, strict=True):
            param.grad = sum(others, total) / size
        count += len(parts)
        for opt in opts:
            opt.step()
    with model.no_sync():
        token_loss(model(inputs), targets).backward()
    said = error_of(lambda: model.save_checkpoint(os.environ["TESTS_FOLDER"]))
    refused = "behind a backward in model.no_sync()" in said
    return other(params_of(net), params_of(expected)), quiet[1:], refused


def low_precision(rank: int, size: int) -> Any:
    """One microbatch in each process, as one process has them: the test compares."""
    torch.manual_seed(0)
    net = GPT(dropout=0.1, depth=2)
    model = model_of(net, precision="bf16", max_grad_norm=0.5, overlap_updates=True)
    for parts in batches_for(size, 3):
        model.train_step(*parts[rank])
    assert model._engine.late.num_steps == 2, "updates run into the next step"
    model.synchronize()
    return params_of(net)


class Normed(nn.Module):
    """Has buffers that each forward changes, and a layer that only some forwards use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(24, 24), nn.BatchNorm1d(24)
        self.extra, self.last = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor, more: bool = False) -> torch.Tensor:
        x = self.norm(self.first(x))
        return self.last(self.extra(x) if more else x)


def buffers(rank: int, size: int) -> Any:
    """Statistics of BatchNorm are process 0's at the beginning of each step, as in DDP."""
    torch.manual_seed(0)
    nets = [Normed() for _ in range(size)]
    for n in nets:
        n.load_state_dict(nets[0].state_dict())
    net = copy.deepcopy(nets[0])
    sgd = {"lr": 0.1, "foreach": False}
    model = model_of(net, optimizer=torch.optim.SGD, optimizer_kwargs=sgd, loss_fn=square_loss)
    batches = [[vector_batch(10 * s + r, 4) for r in range(size)] for s in range(3)]
    for parts in batches:
        for n in nets[1:]:
            n.load_state_dict(nets[0].state_dict())
        for n, (x, y) in zip(nets, parts, strict=True):
            n.zero_grad()
            square_loss(n(x), y).backward()
        for params in zip(*(n.parameters() for n in nets), strict=True):
            if params[0].grad is not None:
                total = sum((p.grad for p in params[1:]), params[0].grad.clone()) / size
                for param in params:
                    param.data.sub_(total, alpha=0.1)
        model.train_step(*parts[rank])
    return other(net.state_dict(), nets[rank].state_dict())


def only_one_uses_it(rank: int, size: int) -> Any:
    """A layer that one process uses: its gradient counts as zeros in the others."""
    torch.manual_seed(0)
    net = Normed().eval()
    expected = copy.deepcopy(net)
    sgd = {"lr": 0.1, "foreach": False}
    model = model_of(net, optimizer=torch.optim.SGD, optimizer_kwargs=sgd, loss_fn=square_loss)
    batches = [vector_batch(r, 4) for r in range(size)]
    opt = torch.optim.SGD(expected.parameters(), **sgd)
    for r, (x, y) in enumerate(batches):
        (square_loss(expected(x, more=r == 1), y) / size).backward()
    opt.step()
    x, y = batches[rank]
    model.train_step({"x": x, "more": rank == 1}, y)
    found = params_of(net)
    return [n for n, p in params_of(expected).items() if not torch.allclose(found[n], p)]


class Noting(nn.Module):
    """Keeps what it has seen, so that it runs as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.seen = nn.Sequential(nn.Linear(24, 24), nn.Dropout(0.5)), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        self.seen.append(y)
        return y


class Halving(nn.Sequential):
    """Goes one way or another by what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x)
        return y / 2 if y.sum() > 0 else y


def not_planned(rank: int, size: int) -> Any:
    """Forwards that run as they are, or are known only then, and hooks on parameters, which see a
    process's own part."""
    found: list[str] = []
    layers = [nn.Linear(24, 24), nn.Dropout(0.5)]
    for mode, net in (
        ("eager", Noting()),
        ("dynamic", Halving(*copy.deepcopy(layers))),
        ("trace", nn.Sequential(*layers)),
    ):
        hooked = mode == "trace"
        for param in net.parameters():
            torch.manual_seed(param.dim())
            nn.init.normal_(param)
        expected = copy.deepcopy(net)
        sgd = {"lr": 0.1, "foreach": False}
        given = {"optimizer": torch.optim.SGD, "optimizer_kwargs": sgd, "loss_fn": square_loss}
        model = model_of(net, microbatch_size=2, **given)
        opt = torch.optim.SGD(expected.parameters(), **sgd)
        for n in (net, expected) if hooked else ():
            next(n.parameters()).register_hook(_doubled)
        for step in range(2):
            parts = [vector_batch(10 * step + r, 4) for r in range(size)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.train_step(*parts[rank])
            plain_step(expected, parts, step, 2, square_loss)
            opt.step()
        assert model.capture_mode == mode
        found += other(params_of(net), params_of(expected))
    return found


def _doubled(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * 2


def not_finite(rank: int, size: int) -> Any:
    """What one process makes infinite is named there, and updates nothing in any."""
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    model = model_of(net, loss_fn=square_loss, detect_nonfinite=True)
    x, y = vector_batch(rank, 4)
    model.train_step(x, y)
    before = params_of(net)
    said = error_of(lambda: model.train_step(x / (1 - rank), y))
    unchanged = not other(params_of(net), before)
    model.train_step(x, y)
    return said, unchanged, params_of(net)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except harmony.HarmonyError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def disagreements(rank: int, size: int) -> Any:
    """What is not the same, or fails in one, is refused in all, and training goes on behind it."""
    torch.manual_seed(0)
    net = GPT(dropout=0.1, depth=1)
    model = model_of(net)
    x, y = token_batch(rank, 4)
    model.train_step(x, y)
    before = params_of(net)
    assert model.optimizer is not None
    group = model.optimizer.param_groups[0]
    group["lr"] = 0.01 * (1 + rank)
    said = {"options": error_of(lambda: model.train_step(x, y))}
    group["lr"] = 0.01
    said["batch"] = error_of(lambda: model.train_step(x[: 0 if rank else 4], y))
    kept = HostState.gradients_of

    def broken(self: HostState, names: Any) -> Any:
        if rank:
            raise RuntimeError("a disk caught fire")
        return kept(self, names)

    HostState.gradients_of = broken  # type: ignore[method-assign]
    said["middle"] = error_of(lambda: model.train_step(x, y))
    HostState.gradients_of = kept  # type: ignore[method-assign]
    said["verify"] = error_of(lambda: model.verify(x, y))
    assert not other(params_of(net), before)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train_step(x[: 4 - rank], y[: 4 - rank])
    said["uneven"] = " ".join(str(w.message) for w in caught)
    said["calls"] = error_of(lambda: model.train_step(x, y) if rank else model.largest_of([1]))
    said["alone"] = error_of(lambda: harmony.Harmony(nn.Linear(2, 2)))
    model.train_step(x, y)
    return said, params_of(net)


def saved(rank: int, size: int) -> Any:
    """A run that is saved and resumed goes on with the same bits, random numbers of each process
    included; one that is asked to end in one process ends in all."""
    torch.manual_seed(rank)
    folder = Path(os.environ["TESTS_FOLDER"], "run")

    def trained(model: harmony.Harmony, step: int, draws: list[float]) -> None:
        x, y = token_batch(10 * step + rank, 4)
        model.train_step(x, y)
        draws.append(float(torch.rand(())))

    net, draws = GPT(dropout=0.1, depth=1), list[float]()
    model = model_of(net)
    with harmony.Run(model, folder, every=2) as run:
        run.resume()
        for step in range(2):
            trained(model, step, draws)
            run.step()
        draws.clear()
        for step in (2, 3):
            trained(model, step, draws)
    model.close()  # the next model of these processes makes connections of its own
    torch.manual_seed(7)
    again, drawn = GPT(dropout=0.1, depth=1), list[float]()
    resumed = model_of(again, seed=3)
    resumed.load_checkpoint(folder)
    for step in (2, 3):
        trained(resumed, step, drawn)
    differ = other(params_of(again), params_of(net))
    missing = error_of(lambda: resumed.load_checkpoint(folder if rank else folder / "none"))
    return differ, drawn == draws, draws, missing


def asked_to_end(rank: int, size: int) -> Any:
    """SIGTERM to process 1 ends the run in both, behind the same step."""
    model = model_of(GPT(dropout=0.1, depth=1))
    folder = Path(os.environ["TESTS_FOLDER"], "ended")
    try:
        with harmony.Run(model, folder, every=100) as run:
            run.resume()
            for step in range(4):
                if rank and step == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                model.train_step(*token_batch(rank, 4))
                run.step()
    except SystemExit as end:
        return end.code, model.num_steps, [path.name for path in folder.iterdir()]
    return None


def some(rank: int, size: int) -> Any:
    """Two of the processes train a model, and then another; the others do not come."""
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        return []
    found = []
    for _ in range(2):
        torch.manual_seed(rank)  # what differs is taken from the first
        net = nn.Linear(24, 24)
        model = model_of(net, loss_fn=square_loss, process_group=group)
        model.train_step(*vector_batch(rank, 4))
        found.append(params_of(net))
        model.close()
    return found


def lost(rank: int, size: int) -> Any:
    """Process 1 ends in the middle of a step."""
    torch.manual_seed(0)
    net = GPT(dropout=0.1, depth=1)
    model = model_of(net)
    x, y = token_batch(rank, 4)
    model.train_step(x, y)
    before = params_of(net)
    if rank == 1:
        HostState.gradients_of = lambda *_: os._exit(0)  # type: ignore[assignment]
    said = error_of(lambda: model.train_step(x, y))
    return said, error_of(lambda: model.train_step(x, y)), other(params_of(net), before)


def interrupted(rank: int, size: int) -> Any:
    """Ctrl-C in process 1 lets its step end, and ends the process; the others hear of it."""
    torch.manual_seed(0)
    net = GPT(dropout=0.1, depth=1)
    model = model_of(net)
    x, y = token_batch(rank, 4)
    model.train_step(x, y)
    if rank:
        kept = HostState.gradients_of

        def asked(self: HostState, names: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return kept(self, names)

        HostState.gradients_of = asked  # type: ignore[method-assign]
    try:
        model.train_step(x, y)
    except KeyboardInterrupt:
        assert rank and model.num_steps == 2
        os._exit(0)
    return error_of(lambda: model.train_step(x, y)), model.num_steps


# What is asked of that


HERE = "tests.training.test_servers:"
IN_TWO = (
    "steps",
    "small_chunks",
    "accumulates",
    "low_precision",
    "buffers",
    "only_one_uses_it",
    "not_planned",
    "not_finite",
    "disagreements",
    "saved",
    "asked_to_end",
    "interrupted",
)


@pytest.fixture(scope="module")
def two() -> dict[str, list[Any]]:
    return on_servers(2, *(HERE + name for name in IN_TWO))


@pytest.fixture(scope="module")
def four() -> dict[str, list[Any]]:
    return on_servers(4, HERE + "steps", HERE + "some", HERE + "lost")


def no_text(found: list[Any]) -> list[Any]:
    """The results, none of which is the text of an error."""
    assert not [x for x in found if isinstance(x, str)], found
    return found


@pytest.mark.parametrize("size", ["two", "four"])
def test_processes_compute_what_plain_pytorch_does_and_send_what_the_formula_says(
    size: str, request: pytest.FixtureRequest
) -> None:
    for differ, (sent, formula) in no_text(request.getfixturevalue(size)["steps"]):
        assert not differ
        assert sent == formula


def test_some_of_the_processes_train_one_model_after_the_other(four: dict[str, list[Any]]) -> None:
    none, first, nobody, third = no_text(four["some"])
    assert not none and not nobody and len(first) == 2
    assert not [differ for a, b in zip(first, third, strict=True) if (differ := other(a, b))]


@pytest.mark.parametrize("name", ["small_chunks", "buffers", "only_one_uses_it", "not_planned"])
def test_plain_pytorch_is_met_in(two: dict[str, list[Any]], name: str) -> None:
    assert no_text(two[name]) == [[], []]


def test_gradients_add_up_in_no_sync_and_are_averaged_behind_it(
    two: dict[str, list[Any]],
) -> None:
    assert no_text(two["accumulates"]) == [([], [0, 0, 0], True)] * 2


def test_one_process_with_the_same_microbatches_has_the_same_bits(
    two: dict[str, list[Any]], vgpus: VirtualGPUs
) -> None:
    torch.manual_seed(0)
    net = GPT(dropout=0.1, depth=2)
    model = model_of(
        net, precision="bf16", max_grad_norm=0.5, microbatch_size=4, process_group=None
    )
    for parts in batches_for(2, 3):
        model.train_step(*(torch.cat(both) for both in zip(*parts, strict=True)))
    for found in no_text(two["low_precision"]):
        assert not other(found, params_of(net))


def test_what_differs_or_fails_in_one_process_is_refused_in_all_and_training_goes_on(
    two: dict[str, list[Any]],
) -> None:
    (first, left), (second, right) = no_text(two["disagreements"])
    assert not other(left, right)
    for said in (first, second):
        assert "ConfigError: processes 0 and 1 of 2 differ in the class" in said["options"]
        assert "what is called ('largest_of' and 'train_step')" in said["calls"]
        assert "comparison with plain PyTorch in one of several processes" in said["verify"]
        assert "process_group=torch.distributed.group.WORLD" in said["alone"]
    assert "PeerError: process 1 of 2 failed: ConfigError: the batch is empty" in first["batch"]
    assert second["batch"].startswith("ConfigError: the batch is empty")
    assert "PeerError: process 1 of 2 failed in this step: ExecutionError" in first["middle"]
    assert "a disk caught fire. No parameter was changed" in second["middle"]
    assert "parts of this batch have 4, 3 samples" in first["uneven"]


def test_what_is_not_finite_in_one_process_updates_nothing_in_any(
    two: dict[str, list[Any]],
) -> None:
    (first, kept, left), (second, kept_too, right) = no_text(two["not_finite"])
    assert kept and kept_too and not other(left, right)
    assert "so it comes from another process" in first and second.startswith(
        "NonFiniteError: step 1"
    )


def test_processes_of_one_server_share_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", index) for index in range(5)]
    assert [len(hardware._part_of(gpus, (rank, 2))) for rank in (0, 1)] == [2, 3]
    assert hardware._part_of(gpus, (0, 1)) == gpus
    with pytest.raises(harmony.ConfigError, match=r"8 processes .* 5 GPUs visible"):
        hardware._part_of(gpus, (7, 8))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes.local_share(object()) == (1, 2) and processes.local_share(None) == (0, 1)
    assert processes.host_memory_of(None, (1, 2)) * 2 <= limits.total_host_nbytes()
    assert processes.host_memory_of(7, (1, 2)) == 7


def test_a_run_is_saved_and_resumed_with_the_random_numbers_of_each_process(
    two: dict[str, list[Any]],
) -> None:
    drawn = []
    for differ, same_draws, draws, _ in no_text(two["saved"]):
        assert not differ and same_draws
        drawn.append(draws)
    assert drawn[0] != drawn[1]
    missing = [found[3] for found in two["saved"]]
    assert missing[0].startswith("ConfigError: there are no checkpoints in")
    assert missing[1].startswith("PeerError: process 0 of 2 failed: ConfigError: there are no")


def test_a_signal_to_one_process_saves_and_ends_the_run_in_all(two: dict[str, list[Any]]) -> None:
    expected = (128 + signal.SIGTERM, 2, ["step-00000002"])
    assert no_text(two["asked_to_end"]) == [expected, expected]


def test_ctrl_c_in_one_process_ends_the_others_behind_the_same_step(
    two: dict[str, list[Any]],
) -> None:
    (said, steps), other_found = two["interrupted"]
    assert said.startswith("PeerError: process 0 of 2 has lost the others (") and steps == 2
    assert other_found == ENDED


def test_a_lost_process_ends_the_others_with_one_message_and_the_state_of_one_step(
    four: dict[str, list[Any]],
) -> None:
    assert four["lost"][1] == ENDED
    for rank in (0, 2, 3):
        said, again, differ = four["lost"][rank]
        assert said.startswith(f"PeerError: process {rank} of 4 has lost the others (")
        assert again == said and not differ
