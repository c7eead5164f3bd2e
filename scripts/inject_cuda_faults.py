#!/usr/bin/env python3
"""Calls of CUDA that fail, on the stand-in: afterwards the state is of one step, or refused.

    scripts/on-standin scripts/inject_cuda_faults.py [--faults 200] [--seed 0] [--first 0]

Each fault is in a process of its own. The n-th call of a kind (memory, pinning, streams, events,
copies, kernels) fails alone, or takes the GPUs with it, or does so once a stream gets to what it
has enqueued, so that another call is the first to be told. It comes while the model is captured,
measured and planned, in a step, in its update, or while a checkpoint is written; training is by
`train_step`, with updates on the host or where the plan puts them, or by a loop of one's own.

Whoever called has to get what he would have got, or one HarmonyError that says what is lost and
what to do. Parameters have to be those before the step or behind it; else the next step has to be
refused. Once the GPUs are lost, parameters have to be readable, the next step has to say the same,
and the process has to end by itself. A checkpoint has to be whole or not to be there, and the one
before it has to load.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import faulthandler
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from disturbed import Subject, same
from inject_faults import Injection

import harmony
import harmony.module
from harmony.profiling import server
from harmony.runtime import native
from tests.cuda import standin

CASE_S = 300  # of a busy machine
FORMS = ("step", "device", "dropin")
PHASES = ("first step", "step", "update", "save", "save meanwhile")
ALONE = {"malloc": 2, "host_register": 2, "host_alloc": 2}
"""What calls of a kind fail with alone: out of memory; all others with an unknown error."""
KINDS = (
    *("malloc", "host_register", "host_alloc", "stream_create", "event_create", "event_record"),
    *("stream_wait", "launch", "copy_in", "copy_out", "copy_within", "copy_peer", "synchronize"),
)
ENQUEUED = ("launch", "copy_in", "copy_out", "copy_within", "copy_peer")
UNKNOWN, LOSING = 999, (700, 710, 719)
ABORTED = "PyTorch aborted the process"
"""When the very event fails that it records as it is given pinned memory back, in a destructor."""
REMEDY = re.compile(
    "start the script again|(load|go back to) a checkpoint|[Nn]o parameter (was|has been|has) "
    "change|smaller microbatch_size|all parameters are updated|whole"
)


def recorded(form: str, kept: Path) -> dict[str, str]:
    """Keep the states of a model that nothing disturbs, before the first step and behind each."""
    subject = Subject(form)
    at_start = subject.state()
    subject.record()
    torch.save([at_start, *subject.states], kept)
    return {"result": "recorded"}


class Arming(Injection):
    """Lets a fault be armed when a function is called."""

    def __init__(self, place: str, arm: Callable[[], None]) -> None:
        super().__init__(place, "", 1, False)
        self.arm = arm

    def __enter__(self) -> Arming:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.happened:
                self.happened = True
                self.arm()
            return self.original(*args, **kwargs)

        setattr(self.owner, self.name, wrapped)
        return self


class Case:
    """A model of a form, taken to a phase, and one call of CUDA that fails in it."""

    def __init__(
        self, form: str, phase: str, folder: Path, states: list[list[torch.Tensor]]
    ) -> None:
        self.form, self.phase, self.folder, self.states = form, phase, folder, states
        self.subject = Subject(form)
        self.at = 0
        if phase != "first step":
            self.subject.train(0)
            self.at = 1
        if phase.startswith("save"):
            self.save()
            self.subject.train(1)
            self.at = 2

    def objects(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model."""
        return {} if self.subject.own is None else {"own": self.subject.own}

    def save(self, **how: Any) -> None:
        """Write a checkpoint."""
        self.subject.model.save_checkpoint(self.folder, **how, **self.objects())

    def act(self, arm: Callable[[], None]) -> int:
        """Do what the phase says, with the fault armed; returns the number of steps taken."""
        if self.phase == "update" and self.form != "dropin":
            places = (
                "harmony.runtime.host.host_state:HostState.update",
                "harmony.runtime.update.optimizer:PackOptimizer._update",
            )
            with Arming(places[0], arm), Arming(places[1], arm):
                self.subject.train(self.at)
            return 1
        arm()
        if self.phase == "save":
            self.save()
            return 0
        if self.phase == "save meanwhile":
            self.save(async_save=True)
            self.subject.train(self.at)
            self.subject.model.finish_saving()
            return 1
        self.subject.train(self.at)
        return 1


def counted(form: str, phase: str, *where: Any) -> dict[str, Any]:
    """How often a phase makes each kind of call, undisturbed."""
    case = Case(form, phase, *where)
    before: list[dict[str, standin.Count]] = []
    case.act(lambda: before.append(standin.counters()) if not before else None)
    found = standin.calls_since(before[0]) if before else {}
    return {"counts": {kind: found[kind] for kind in KINDS if found.get(kind)}}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One call of CUDA that fails: the nth of its kind in a phase, how, and with which error."""

    form: str
    phase: str
    kind: str
    nth: int
    error: int
    manner: str


def disturbed(fault: Fault, *where: Any) -> dict[str, str]:
    """Let the call fail, and say what became of it."""
    case = Case(fault.form, fault.phase, *where)
    before: list[dict[str, standin.Count]] = []

    def arm() -> None:
        if not before:
            before.append(standin.counters())
            standin.fail(fault.kind, fault.nth, fault.error, fault.manner)

    caught: BaseException | None = None
    taken = 0
    try:
        taken = case.act(arm)
    except BaseException as raised:
        caught = raised
    happened = bool(before) and standin.calls_since(before[0])[fault.kind] >= fault.nth
    standin.fail(fault.kind, 0, 0)
    if not happened:
        return {"result": "did not happen"}
    said = "" if caught is None else f"{type(caught).__name__}: {caught}"
    result = judge(case, caught, taken)
    if result.startswith("BAD") and caught is not None:
        traceback.print_exception(caught)
    return {"result": result, "said": said}


def judge(case: Case, caught: BaseException | None, taken: int) -> str:
    """What a fault has led to; anything that begins with BAD is not to happen."""
    subject, lost = case.subject, any(map(native.is_lost, case.subject.model._engine.devices))
    if caught is not None and not isinstance(caught, harmony.HarmonyError):
        return f"BAD: a raw {type(caught).__name__}"
    if caught is not None and not REMEDY.search(str(caught)):
        return "BAD: it does not say what is lost and what to do"
    torn = bool(getattr(caught, "torn", False))
    try:
        found = subject.state() if not lost else parameters(subject)
    except BaseException as error:
        return f"BAD: the state cannot be read: {type(error).__name__}"
    expected = case.states if not lost else [state[: len(found)] for state in case.states]
    at = next((i for i, state in enumerate(expected) if same(found, state)), None)
    forward_ran = case.form == "dropin" and subject.model.num_steps > case.at
    if (
        at is None
        and forward_ran
        and same(trained(subject, found), trained(subject, expected[case.at]))
    ):
        return "the forward has run" + (", the GPUs are lost" if lost else "")
    if caught is None and at != case.at + taken:
        return f"BAD: nothing was raised, and the state is {at}"
    refused = next_step(subject, case.at if at is None else at)
    if lost:
        if not isinstance(refused, harmony.DeviceLostError):
            return f"BAD: the GPUs are lost, and the next step says {refused!r}"
        if at is None and not torn:
            return "BAD: torn without a word"
        if caught is not None and not isinstance(
            caught, (harmony.DeviceLostError, harmony.NotSavedError)
        ):
            return "BAD: the GPUs are lost, and nothing says so"
        return "the GPUs are lost, " + ("torn, and it says so" if at is None else "state whole")
    if at is None or torn:
        if isinstance(refused, harmony.HarmonyError) and "load a checkpoint" in str(refused):
            return "refused until a state is loaded"
        if case.form == "dropin" and refused is None and subject.model.num_steps > case.at:
            return "the forward has run"
        return f"BAD: torn, and the next step says {refused!r}"
    if refused is not None:
        return f"BAD: the next step fails: {refused!r}"
    behind = at + 1
    if behind < len(case.states) and not same(subject.state(), case.states[behind]):
        if case.form == "dropin" and at == case.at:
            return "the forward has run"
        return f"BAD: the next step, after state {at}, computes something else"
    return "survived" if caught is None else f"said, state whole ({type(caught).__name__})"


def parameters(subject: Subject) -> list[torch.Tensor]:
    """What has to be left when the GPUs are lost."""
    return [value.detach().cpu().clone() for value in subject.model.state_dict().values()]


def trained(subject: Subject, state: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a state, what updates change: a forward of a loop of one's own changes the rest."""
    params = dict(subject.model.named_parameters())
    names = subject.model.state_dict()
    return [value for name, value in zip(names, state, strict=False) if name in params]


def next_step(subject: Subject, number: int) -> BaseException | None:
    """Take a step; returns what it raises."""
    try:
        subject.train(min(number, len(subject.batches) - 1))
    except BaseException as error:
        return error
    return None


def reloaded(form: str, folder: Path, states: list[list[torch.Tensor]]) -> dict[str, str]:
    """Load the newest checkpoint of a run that was disturbed, in a process that is not."""
    subject = Subject(form)
    objects = {} if subject.own is None else {"own": subject.own}
    step = subject.model.load_checkpoint(folder, **objects).step
    whole = same(subject.state(), states[step])
    return {"result": "loads" if whole else f"BAD: the checkpoint of step {step} is torn"}


@contextlib.contextmanager
def folder_for_now() -> Iterator[Path]:
    """A folder that is removed behind the block; by the parent only, however a child ends."""
    folder = Path(tempfile.mkdtemp(prefix="cuda-fault-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def in_a_process(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Run something in a child; returns what it found, and how it ended where that was badly."""
    sys.stdout.flush()
    with folder_for_now() as folder:
        child = os.fork()
        if child == 0:
            _be_the_child(work, folder)
        status = _wait(child)
        errors = (folder / "errors").read_text(errors="replace")
        found = {}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            found = json.loads((folder / "found").read_text())
    lines = [line for line in errors.splitlines() if line.strip()]
    if status is None:
        return found, f"BAD: a hang: {' | '.join(lines[-25:])}"
    if status == -signal.SIGABRT and "Exception in pinned allocator free()" in errors:
        return {"result": ABORTED}, ""
    if status or not found or "terminate called" in errors:
        return found, f"BAD: ended with {status}: {' | '.join(_telling(lines))}"
    if str(found.get("result", "")).startswith("BAD"):
        found["stderr"] = " | ".join(lines[-30:])
    return found, ""


def _telling(lines: list[str]) -> list[str]:
    """Return what lines say of a process that ended badly, without addresses."""
    return [line for line in lines if not line.startswith("frame #")][-12:]


def _be_the_child(work: Callable[[], dict[str, Any]], folder: Path) -> None:
    errors = os.open(folder / "errors", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    faulthandler.dump_traceback_later(CASE_S - 10, exit=False)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    standin.install()
    server._LARGER_THAN_CACHES_NBYTES = 2**20  # what updates cost is not asked here
    (folder / "found").write_text(json.dumps(work()))
    # As any script ends: what is left of a lost GPU is taken down now. The frames below are the
    # parent's, whose folders are not to be removed here.
    ctypes.pythonapi.Py_Exit(0)


def _wait(child: int) -> int | None:
    until = time.monotonic() + CASE_S
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Drawing:
    """Draws faults: where, which call, how.

    Attributes:
        states: by form, those of a model that nothing disturbs.
    """

    def __init__(self) -> None:
        self.states: dict[str, list[list[torch.Tensor]]] = {}
        self._counts: dict[tuple[str, str], dict[str, int]] = {}
        for form in FORMS:
            with folder_for_now() as folder:
                kept = folder / "states.pt"
                _undisturbed(functools.partial(recorded, form, kept))
                self.states[form] = torch.load(kept)

    def counts(self, form: str, phase: str) -> dict[str, int]:
        """How often each kind is called there."""
        if (form, phase) not in self._counts:
            with folder_for_now() as folder:
                work = functools.partial(counted, form, phase, folder, self.states[form])
                self._counts[form, phase] = _undisturbed(work)["counts"]
        return self._counts[form, phase]

    def draw(self, chance: random.Random) -> Fault:
        """Return a fault."""
        form, phase = chance.choice(FORMS), chance.choice(PHASES)
        while not (counts := self.counts(form, phase)):  # as an update on the host
            phase = chance.choice(PHASES)
        kind = chance.choice(sorted(counts))
        manner = chance.choice(standin.MANNERS if kind in ENQUEUED else standin.MANNERS[:2])
        error = ALONE.get(kind, UNKNOWN) if manner == "alone" else chance.choice(LOSING)
        return Fault(form, phase, kind, chance.randint(1, counts[kind]), error, manner)


def _undisturbed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    found, bad = in_a_process(work)
    if bad:
        raise SystemExit(f"undisturbed: {bad}")
    return found


def run_case(drawing: Drawing, seed: str) -> dict[str, str]:
    """Inject one fault; drawn again where the call is not made in that run."""
    chance = random.Random(seed)
    for _ in range(5):
        fault = drawing.draw(chance)
        states = drawing.states[fault.form]
        with folder_for_now() as folder:
            found, bad = in_a_process(functools.partial(disturbed, fault, folder, states))
            if fault.phase.startswith("save") and not bad and is_good(found["result"]):
                work = functools.partial(reloaded, fault.form, folder, states)
                again, bad = in_a_process(work)
                bad = bad or ("" if is_good(again["result"]) else again["result"])
        found |= {"result": bad} if bad else {}
        if found["result"] != "did not happen":
            break
    return {**dataclasses.asdict(fault), **found}


def is_good(result: str) -> bool:
    """Whether a fault has led to what it should."""
    return not result.startswith("BAD")


def main() -> int:
    """Run the command line; the exit code says whether all was well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault")
    parser.add_argument("--verbose", action="store_true", help="a line for each fault")
    given = parser.parse_args()
    if not standin.is_loaded():
        print("inject_cuda_faults: on the stand-in only (scripts/on-standin)", file=sys.stderr)
        return 2
    results: collections.Counter[str] = collections.Counter()
    drawing, num_bad = Drawing(), 0
    for number in range(given.first, given.first + given.faults):
        case = run_case(drawing, f"{given.seed} {number}")
        results[case["result"].split(":")[0]] += 1
        bad = not is_good(case["result"])
        num_bad += bad
        if bad or given.verbose:
            print(number, *(f"{key}={value}" for key, value in case.items()), sep="  ", flush=True)
    print(f"{sum(results.values())} faults: " + ", ".join(f"{v} {k}" for k, v in results.items()))
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
