"""Faults of all kinds, at all kinds of places: afterwards the state is of one step, or refused.

    scripts/inject_faults.py [--faults 200] [--seed 0] [--forms step device dropin dynamic save]

Each fault (an exception, Ctrl-C once or twice, out of memory, device memory that the script itself
takes and keeps, a limit of the host) comes once, in a chosen call of a chosen function: while the
model is captured, measured and planned, in each kind of instruction, in the update, in what comes
behind it, and in what the user has written. After each, parameters, buffers, optimizer state,
random state and the number of steps have to be those before the step, or those of a model that was
not disturbed; else the next step has to be refused until a state is loaded. Ctrl-C has to come up.
Then the run goes on from its checkpoint: the next step has to be that of the run that was not
disturbed, bit for bit.

The form `save` has faults of the disk: each call that makes, writes, syncs or renames something in
a save fails in turn, with ENOSPC and with EIO, in saves that are waited for and that are not; and
saves under limits of the host. The save has to fail by name, what was saved before has to be as it
was, and training has to go on, and be resumed, bit for bit. A process that does not end in time
counts as a hang.
"""

from __future__ import annotations

import argparse
import collections
import errno
import faulthandler
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from disturbed import Subject, same

import harmony
from harmony.runtime import interrupts

FORMS = ("step", "device", "dropin", "dynamic", "save")
CASE_S, PREPARING_S = 90, 600

PREPARING = {
    "capture": "harmony.engine.variant_factory:capture",
    "costs": "harmony.engine.variant:Variant._measure",
    "measuring": "harmony.profiling.layer_times:_LayerRun._measure",
    "planning": "harmony.engine.variant:choose_steadily",
    "slots": "harmony.runtime.exec.executor:Executor._reserve_slots",
    "prepare": "harmony.runtime.exec.device_program:DeviceProgram._prepare",
}
RUNNING = {
    "submit": "harmony.runtime.exec.workers:Worker.submit",
    "forward": "harmony.runtime.exec.stage:Stage.forward",
    "forward saving": "harmony.runtime.exec.stage:Stage.forward_saving",
    "backward": "harmony.runtime.exec.stage:Stage.backward",
    "backward saved": "harmony.runtime.exec.stage:Stage.backward_saved",
    "copies": "harmony.runtime.exec.device_program:_copy_all",
    "copy of a value": "harmony.runtime.exec.device_program:_copy_value",
    "event": "harmony.runtime.exec.signals:Signals.issue",
    "gradients": "harmony.runtime.host.host_state:HostState.settle",
    "end of device": "harmony.runtime.device:DeviceContext.synchronize",
    "layer state": "harmony.runtime.step.layer_state:LayerStates.leave",
    "random state": "harmony.runtime.device:DeviceContext.set_random_state",
    "user's layer": "disturbed:Layer.inside",
}
BEHIND = {
    "inputs": "harmony.engine.train_steps:load_inputs",
    "loss": "harmony.engine.train_steps:weighted_sum",
    "commit": "harmony.runtime.step.layer_state:LayerStates.commit",
    "set": "harmony.runtime.step.layer_state:_set",
    "record": "harmony.report.session:ModelRecord.stepped",
}
UPDATES = {
    "update": "harmony.runtime.host.host_state:HostState.update",
    "optimizer": "harmony.runtime.update.optimizer:PackOptimizer._update",
    "user's optimizer": "disturbed:Own.inside",
}
DROPIN = {
    "inputs": "harmony.engine.own_loop:load_inputs",
    "outputs": "harmony.engine.own_loop:joined_outputs",
    "attach": "harmony.engine.own_loop:attach",
    "output gradients": "harmony.engine.own_loop:load_gradients",
    "hand out": "harmony.engine.grad_alias:AliasedGradients.hand_out",
    "take back": "harmony.engine.grad_alias:AliasedGradients.take_back",
}
PLACES = {
    "step": PREPARING | RUNNING | BEHIND | UPDATES,
    "device": PREPARING | RUNNING | BEHIND | UPDATES,
    "dropin": PREPARING | RUNNING | DROPIN | {"commit": BEHIND["commit"]},
    "dynamic": PREPARING
    | RUNNING
    | BEHIND
    | UPDATES
    | {"dynamic": "harmony.engine.dynamic:DynamicRunner.ready"},
}
FAULTS = ("error", "no text", "ctrl-c", "ctrl-c twice", "out of memory", "exit", "harmony's own")
FAULTS += ("takes memory",)
DISK = {
    "make a file": "os:open",
    "make a folder": "os:mkdir",
    "write": "harmony.checkpoint.writing:_write_all",
    "sync": "os:fsync",
    "rename": "os:rename",
    "change names": "harmony.checkpoint.writing:_exchange",
}
ERRORS = ("ENOSPC", "EIO")
LIMITS = {"size of files": resource.RLIMIT_FSIZE, "open files": resource.RLIMIT_NOFILE}
LIMITED_TO = {"size of files": 4096, "open files": 3}


class NoTextError(Exception):
    """An exception whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def throw(fault: str, subject: Subject | None) -> None:
    """Let a fault happen here."""
    if fault == "takes memory" and subject is not None:
        subject.take_memory()
        return
    if fault == "error":
        raise ValueError("injected")
    if fault == "no text":
        raise NoTextError
    if fault == "out of memory":
        raise torch.OutOfMemoryError("injected: out of memory")
    if fault == "exit":
        raise SystemExit(3)
    if fault == "harmony's own":
        raise harmony.HarmonyError("injected")
    for number in range(1, 3 if fault == "ctrl-c twice" else 2):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        until = time.monotonic() + 1.0
        while interrupts._held and len(interrupts._held[0]._came) < number:
            if time.monotonic() > until:
                break


def found_at(place: str) -> tuple[Any, str]:
    """Where a function is, and its name there."""
    module, _, name = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parts, last = name.split(".")
    for part in parts:
        owner = getattr(owner, part)
    return owner, last


class Injection:
    """One fault, in one call of one function."""

    def __init__(
        self, place: str, fault: str, call: int, after: bool, subject: Subject | None = None
    ) -> None:
        self.owner, self.name = found_at(place)
        self.subject, self.fault, self.left, self.after = subject, fault, call, after
        self.original = vars(self.owner)[self.name]
        self.happened = False

    def __enter__(self) -> Injection:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left or self.happened:
                return self.original(*args, **kwargs)
            self.happened = True
            found = self.original(*args, **kwargs) if self.after else None
            throw(self.fault, self.subject)
            return found if self.after else self.original(*args, **kwargs)

        setattr(self.owner, self.name, wrapped)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.original)


def run_case(subject: Subject, rng: random.Random) -> dict[str, str]:
    """Inject one fault and say what became of it; drawn again where the place is not reached."""
    for _ in range(8):
        case = _try_case(subject, rng)
        if case["result"] != "did not happen":
            break
    return case


def _try_case(subject: Subject, rng: random.Random) -> dict[str, str]:
    place = rng.choice(sorted(PLACES[subject.form]))
    # A recording takes back what a layer leaves behind: it would hold memory that nobody has.
    fault = rng.choice(FAULTS[:-1] if place == "user's layer" else FAULTS)
    call, after = rng.choice((1, 1, 2, 3, 5)), rng.random() < 0.5
    subject.load()
    if place in PREPARING:
        subject.model._engine.variants.forget()
        subject.model._engine.dynamic.forget()
    case = {"place": place, "fault": fault, "call": f"{call} {'after' if after else 'before'}"}
    generators = torch.get_rng_state()
    subject.may_take = True
    caught: BaseException | None = None
    with Injection(PLACES[subject.form][place], fault, call, after, subject) as injection:
        try:
            subject.train(1)
        except BaseException as error:
            caught = error
    if place == "user's layer":  # which counted its calls: such a forward is captured otherwise
        subject.model._engine.variants.forget()
        subject.model._engine.dynamic.forget()
    result = judge(subject, injection, caught, generators)
    return case | {"result": result if result.startswith("BAD") else resumed(subject, result)}


def resumed(subject: Subject, result: str) -> str:
    """The result; bad if a run that is resumed from its checkpoint is another."""
    subject.load()
    if not same(subject.state(), subject.states[0]):
        return f"BAD: {result}, and the checkpoint is another"
    subject.train(1)
    return result if same(subject.state(), subject.states[1]) else f"BAD: {result}, resumed wrong"


def judge(
    subject: Subject,
    injection: Injection,
    caught: BaseException | None,
    generators: torch.Tensor,
) -> str:
    """What a fault has led to; anything that begins with BAD is not to happen."""
    if not injection.happened:
        return "did not happen"
    if injection.fault.startswith("ctrl-c") and not isinstance(caught, KeyboardInterrupt):
        return f"BAD: Ctrl-C was lost ({type(caught).__name__})"
    if isinstance(caught, torch.OutOfMemoryError):
        return "BAD: a raw OutOfMemoryError"
    if not torch.equal(torch.get_rng_state(), generators):
        return "BAD: the random state is another"
    subject.let_go()
    found = subject.state()
    at = next((i for i, state in enumerate(subject.states) if same(found, state)), None)
    if at == 0 and subject.own is not None and _is_half_way(subject):
        at = None
    try:
        subject.train(1 if at == 0 else 2)
    except harmony.HarmonyError as error:
        if "load a checkpoint" in str(error):
            return "refused until a state is loaded"
        return f"BAD: the next step fails: {error}"
    except BaseException as error:
        return f"BAD: the next step fails: {type(error).__name__}"
    if at is None:
        half = subject.own is not None and subject.model.num_steps == 3
        return "the forward has run" if half else "BAD: torn, and the next step is accepted"
    if not same(subject.state(), subject.states[at + 1]):
        return f"BAD: the next step, after state {at}, computes something else"
    return "as before the step" if at == 0 else "as after the step"


def _is_half_way(subject: Subject) -> bool:
    """Drop-in: the forward has been committed, as in plain PyTorch, and the backward failed."""
    return subject.model.num_steps != int(subject.states[0][-1])


class FailingDisk:
    """In a block, one call of those that change something on the disk fails."""

    def __init__(self, error: str, call: int, meanwhile: bool) -> None:
        self._error, self._call, self._thread = error, call, "harmony-save" if meanwhile else None
        self._places = {what: found_at(place) for what, place in DISK.items()}
        self._originals = {what: vars(o)[name] for what, (o, name) in self._places.items()}
        self.calls, self.place = 0, "?"

    def _wrapped(self, what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            thread = threading.current_thread()
            ours = thread.name == self._thread or thread is threading.main_thread()
            if ours and (self._thread is None or thread.name == self._thread):
                self.calls += 1
                if self.calls == self._call:
                    self.place = what
                    number = getattr(errno, self._error)
                    raise OSError(number, os.strerror(number))
            return self._originals[what](*args, **kwargs)

        return call

    def __enter__(self) -> FailingDisk:
        for what, (owner, name) in self._places.items():
            setattr(owner, name, self._wrapped(what))
        return self

    def __exit__(self, *_: object) -> None:
        for what, (owner, name) in self._places.items():
            setattr(owner, name, self._originals[what])


class Limited:
    """In a block, the process may have less of something."""

    place = "limit"

    def __init__(self, what: str) -> None:
        self._kind, self._to = LIMITS[what], LIMITED_TO[what]
        self._before = resource.getrlimit(self._kind)

    def __enter__(self) -> Limited:
        resource.setrlimit(self._kind, (self._to, self._before[1]))
        return self

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(self._kind, self._before)


def run_save_case(subject: Subject, number: int) -> dict[str, str]:
    """Let one call of a save fail, each in turn, and say what became of it."""
    limit = [*LIMITS, None, None, None, None, None, None][number % 8]
    fault, meanwhile = ERRORS[number // 2 % 2], number % 2 == 1
    again = number // 4 % 2 == 1  # of a step that has a checkpoint already
    call = 1 + number // 8
    subject.load()
    subject.train(1)
    newer = subject.folder / "step-00000002"
    if again:
        subject.save()
    before = contents(subject.folder)
    disk = FailingDisk(fault, call, meanwhile) if limit is None else Limited(limit)
    case = {
        "fault": limit or fault,
        "call": f"{call} {'meanwhile' if meanwhile else 'waited for'}",
    }
    caught: BaseException | None = None
    with disk:
        try:
            subject.save(meanwhile)
            subject.model.finish_saving()
        except BaseException as error:
            caught = error
    if isinstance(disk, FailingDisk) and disk.calls < call:
        found = "did not happen"
    elif caught is not None and not isinstance(caught, harmony.NotSavedError):
        found = f"BAD: {type(caught).__name__} instead of NotSavedError"
    else:
        found = judge_save(subject, before, caught is None)
    if not found.startswith("BAD"):
        found = resumed(subject, found)
    shutil.rmtree(newer, ignore_errors=True)
    return case | {"place": disk.place, "result": found}


def judge_save(subject: Subject, before: dict[str, bytes], saved: bool) -> str:
    """What a fault in a save has led to."""
    if not saved and before.items() - contents(subject.folder).items():
        return "BAD: what was saved before is not as it was"
    if any(path.name.startswith(".") for path in subject.folder.iterdir()):
        return "BAD: parts are left"
    if not same(subject.state(), subject.states[1]):
        return "BAD: the model is another"
    subject.train(2)
    if not same(subject.state(), subject.states[2]):
        return "BAD: the next step computes something else"
    subject.model.load_checkpoint(subject.folder, **subject.objects())
    at = subject.model.num_steps - int(subject.states[0][-1])
    if not same(subject.state(), subject.states[at]) or (saved and at != 1):
        return "BAD: the newest checkpoint is another"
    return "saved all the same" if saved else "not saved, said by name"


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def work(form: str, seed: int, first: int, last: int) -> None:
    """Run some cases in this process; a line of JSON for each."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    interrupts.SAME_S = 0.0
    harmony.virtual_gpus(count=2, memory="64MiB")
    faulthandler.dump_traceback_later(PREPARING_S, exit=True)
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(form, folder)
        subject.record()
        for number in range(first, last):
            faulthandler.dump_traceback_later(CASE_S, exit=True)
            if form == "save":
                case = run_save_case(subject, number)
            else:
                case = run_case(subject, random.Random(f"{seed} {form} {number}"))
            print(json.dumps({"form": form, "number": number, **case}), flush=True)
    faulthandler.cancel_dump_traceback_later()


def run_form(form: str, seed: int, count: int, report: Callable[[dict[str, str]], None]) -> None:
    """Run the cases of a form in processes of their own, a new one after each that fails."""
    first = 0
    while first < count:
        words = [sys.executable, __file__, "--work", form, str(seed), str(first), str(count)]
        done = subprocess.run(words, capture_output=True, text=True)
        cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for case in cases:
            report(case)
        first += len(cases)
        if first < count:
            tail = " | ".join(done.stderr.strip().splitlines()[-3:])
            lost = {"form": form, "place": "?", "fault": "?", "call": str(first)}
            report(lost | {"result": f"BAD: hang or crash (exit {done.returncode}): {tail}"})
            first += 1


def main() -> int:
    """Run the command line; the exit code says whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        form, *numbers = given.work
        work(form, *map(int, numbers))
        return 0
    results: collections.Counter[str] = collections.Counter()
    bad = []

    def report(case: dict[str, str]) -> None:
        results[case["result"].split(":")[0]] += 1
        if case["result"].startswith("BAD"):
            bad.append(case)
            print("  ".join(f"{key}={value}" for key, value in case.items()), flush=True)

    for index, form in enumerate(given.forms):
        share = given.faults * (index + 1) // len(given.forms)
        run_form(form, given.seed, share - given.faults * index // len(given.forms), report)
    print(f"{sum(results.values())} faults: " + ", ".join(f"{v} {k}" for k, v in results.items()))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
