"""Every refusal that the checker can utter is uttered: one wrong schedule for each, told by text.

The last test reads the checker's modules: each of their ``raise`` statements is reached by one of
the cases here.
"""

from __future__ import annotations

import ast
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import harmony.planner.check.verify
import harmony.planner.ir.issue
from harmony.core.layergraph import LayerGraph
from harmony.errors import DoesNotFitError, PlanError, ScheduleError
from harmony.planner.check.verify import check_together, verify
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Instruction, Op, Schedule, Slots
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, StepSpec, TaskGraph, TensorRef
from harmony.planner.lower.passes import in_the_same_slots, lower
from tests.toys import chain, packs, server, step, uniform_costs

FOLDER = Path(harmony.planner.check.verify.__file__).parent
MODULES = (*sorted(FOLDER.glob("*.py")), Path(harmony.planner.ir.issue.__file__))

Edit = Callable[[str], str]


def change(old: str, new: str) -> Edit:
    """Replace a piece of text that occurs once."""

    def edit(text: str) -> str:
        assert text.count(old) == 1, f"{text.count(old)} times: {old!r}\n{text}"
        return text.replace(old, new)

    return edit


def both(*edits: Edit) -> Edit:
    def edit(text: str) -> str:
        for one in edits:
            text = one(text)
        return text

    return edit


def one_gpu(
    graph: LayerGraph | None = None, spec: StepSpec | None = None, policy: Policy | None = None
) -> tuple[Schedule, TaskGraph]:
    spec = spec or step(4, 2, packs(2), packs(2, 4))
    tasks = build_tasks(graph or chain(4), spec)
    return lower(tasks, server(1), policy or Policy()), tasks


def replicas() -> tuple[Schedule, TaskGraph]:
    tasks = build_tasks(chain(4), step(2, 1, packs(2), packs(2, 4), replicas=2))
    return lower(tasks, server(2), Policy()), tasks


def resident() -> tuple[Schedule, TaskGraph]:
    return one_gpu(chain(2), step(2, 1, (), packs(2)), Policy(resident=packs(2)))


def changing() -> tuple[Schedule, TaskGraph]:
    """The first layer changes its buffers."""
    graph = chain(4)
    layers = (replace(graph.layers[0], changes_state=True), *graph.layers[1:])
    return one_gpu(replace(graph, layers=layers), step(4, 2, packs(2), packs(2, 4)))


def rounds() -> tuple[Schedule, TaskGraph]:
    spec = replace(step(4, 1, packs(2, 4), packs(2, 4, 6)), rounds=2)
    return one_gpu(chain(6), spec, Policy(boundary="swap"))


def unequal() -> tuple[Schedule, TaskGraph]:
    return one_gpu(chain(4), step(3, 2, packs(2), packs(2, 4)), Policy(boundary="swap"))


ALLOC, RECORD = "  compute Alloc W[2:4] slot 1\n", "  update  Record e91\n"
SEND = "d2h     SwapOut X4@0:2\n"
LAST = "  compute Drop dW[0:2]%0\n"
U2, U0 = (
    "  update  Run U[2:4] (dW[2:4]%0 K[2:4] W[2:4]) -> K[2:4] W[2:4]\n",
    "  update  Run U[0:2] (dW[0:2]%0 K[0:2] W[0:2]) -> K[0:2] W[0:2]\n",
)
A2 = "  update  Run A(dW[2:4]%1) (dW[2:4]%1 dW[2:4]%0) -> dW[2:4]%0\n"
READ_ALL = (
    "  compute Alloc W[1:3] slot 0\n  compute Record e90\n  h2d     Wait e90\n"
    "  h2d     Wait e91\n  h2d     SwapIn W[1:3]\n  h2d     Record e92\n"
)
"""Layers of two packs, of which one has been updated."""

Case = tuple[Callable[[], tuple[Schedule, TaskGraph]], Edit, str]

CASES: dict[str, Case] = {
    # the form
    "a device is resident with a value": (
        resident,
        change("resident=", "resident=X0@0:1,"),
        r"X0@0:1 cannot be resident on gpu0",
    ),
    "something is resident twice": (
        resident,
        change("resident=W[0:2],", "resident=W[0:2],W[0:2],"),
        "resident on two devices, or twice on one",
    ),
    "a stream of another operation": (
        one_gpu,
        change("  compute Drop W[2:4]\n", "  d2h     Drop W[2:4]\n"),
        "Drop cannot be on stream 'd2h' here",
    ),
    "a layer that is not there": (
        one_gpu,
        change("h2d     SwapIn W[2:4]", "h2d     SwapIn W[2:5]"),
        r"there is no W\[2:5\] in this step",
    ),
    "samples that are not there": (
        one_gpu,
        change("d2h     SwapOut X4@0:2", "d2h     SwapOut X4@0:5"),
        "there is no X4@0:5 in this step",
    ),
    "a send to itself": (one_gpu, change(SEND, "p2p     Send X4@0:2 gpu0\n"), "another device"),
    "weights without a slot": (
        one_gpu,
        change("compute Alloc W[2:4] slot 1", "compute Alloc W[2:4]"),
        "weights and gradients live in slots",
    ),
    "part 0 to a stage": (
        one_gpu,
        change("SwapOut dW[2:4]%0", "SwapOut dW[2:4]%0 stage 0"),
        "go to a stage",
    ),
    "a value over another one": (
        rounds,
        change("SwapOut X2@2:3 over X2@0:1", "SwapOut X2@2:3 over X4@0:1"),
        "only a value lies over another one of its kind",
    ),
    "a value over one that is not there yet": (
        rounds,
        change("SwapOut X2@2:3 over X2@0:1", "SwapOut X2@2:3 over X2@3:4"),
        "X2@2:3 cannot take the memory of X2@3:4 on the host",
    ),
    "a value over a smaller one": (
        unequal,
        both(
            change("  d2h     SwapOut X4@0:2\n", ""),
            change("SwapOut X4@2:3\n", "SwapOut X4@2:3\n  d2h     SwapOut X4@0:2 over X4@2:3\n"),
        ),
        "X4@0:2 is larger than X4@2:3, whose memory it takes",
    ),
    "a value over one that is still to be read": (
        rounds,
        change("SwapOut X2@1:2\n", "SwapOut X2@1:2 over X2@0:1\n"),
        "nothing on the host holds X2@0:1",
    ),
    "gradients that do not come back": (
        rounds,
        change("  h2d     SwapIn dW[2:4]%0\n", ""),
        r"dW\[2:4\]%0 has memory on gpu0, but nothing is in it yet",
    ),
    # what runs
    "a task twice": (one_gpu, change(U2, U2 + U2), r"U\[2:4\] runs twice"),
    "an update on the device": (
        one_gpu,
        both(change(U0, ""), change(LAST, LAST + U0.replace("update ", "compute"))),
        r"U\[0:2\] cannot run here",
    ),
    "a task never": (one_gpu, change(U2, ""), r"tasks that never run: U\[2:4\]"),
    "a task of another step": (
        one_gpu,
        change(U2, U2 + "  update  Run U[2:3] (K[2:3]) -> K[2:3]\n"),
        r"U\[2:3\] is not a task of this step",
    ),
    "a task with one read less": (
        one_gpu,
        change("Run U[2:4] (dW[2:4]%0 K", "Run U[2:4] (K"),
        "does not read and write what it should",
    ),
    # the order of issue
    "an event twice": (one_gpu, change("Record e16", "Record e15"), "e15 is recorded twice"),
    "an event never": (one_gpu, change("  d2h     Record e16\n", ""), "e16 is never recorded"),
    "a deadlock": (
        one_gpu,
        both(
            change("update  Wait e16\n", "update  Wait e90\n"),
            change(U0, U0 + "  update  Record e90\n"),
        ),
        "deadlock",
    ),
    # slots and stages
    "a slot that is not free": (
        one_gpu,
        change("compute Alloc W[2:4] slot 1", "compute Alloc W[2:4] slot 0"),
        "slot 0 still holds",
    ),
    "a slot that is not there": (
        one_gpu,
        change("compute Alloc W[2:4] slot 1", "compute Alloc W[2:4] slot 7"),
        "131072 bytes in slot 7 of 2x131072",
    ),
    "a stage that is too small": (
        replicas,
        change("stages=2x131072", "stages=2x131008"),
        "131072 bytes in stage 0",
    ),
    "a stage that is not free": (
        replicas,
        change("SwapOut dW[0:2]%1 stage 1", "SwapOut dW[0:2]%1 stage 0"),
        r"stage 0 holds dW\[2:4\]%1, not yet added",
    ),
    "a part that is in no stage": (
        replicas,
        change("  d2h     SwapOut dW[2:4]%1 stage 0\n", ""),
        r"dW\[2:4\]%1 is in no staging buffer",
    ),
    # memories of devices
    "memory taken twice": (
        one_gpu,
        change("  compute Drop X0@0:2\n  compute Wait e4\n", "  compute Wait e4\n"),
        "X0@0:2 is still on gpu0",
    ),
    "what is resident is dropped": (
        resident,
        change("program host\n", "  compute Drop W[0:2]\nprogram host\n"),
        r"W\[0:2\] is resident: it is never dropped",
    ),
    "weights go to the host": (
        one_gpu,
        change("d2h     SwapOut dW[2:4]%0\n", "d2h     SwapOut W[2:4]\n"),
        "weights change on the host only",
    ),
    "a gradient without a slot": (
        one_gpu,
        change("  compute Alloc dW[2:4]%0 slot 0\n", ""),
        r"dW\[2:4\]%0 has no slot on gpu0",
    ),
    "a gradient that starts again": (
        one_gpu,
        change("X0@2:4 dX2@2:4 dW[0:2]%0)", "X0@2:4 dX2@2:4)"),
        r"dW\[0:2\]%0 is overwritten, not added to",
    ),
    "memory in which nothing is": (
        one_gpu,
        change("  h2d     SwapIn W[2:4]\n", ""),
        r"W\[2:4\] has memory on gpu0, but nothing is in it yet",
    ),
    "what is not there": (
        one_gpu,
        change("  compute Drop W[2:4]\n", "  compute Drop W[2:4]\n  compute Drop W[2:4]\n"),
        r"W\[2:4\] is not on gpu0",
    ),
    "a copy to no memory": (
        one_gpu,
        change("  compute Alloc W[2:4] slot 1\n", ""),
        r"W\[2:4\] has no memory on gpu0",
    ),
    "a copy over something": (
        one_gpu,
        change("  h2d     SwapIn W[2:4]\n", "  h2d     SwapIn W[2:4]\n  h2d     SwapIn W[2:4]\n"),
        r"W\[2:4\] is on gpu0 already",
    ),
    "something is never dropped": (
        one_gpu,
        change("  compute Drop W[2:4]\n", ""),
        r"gpu0 W\[2:4\] is never dropped",
    ),
    "a race": (one_gpu, change("  h2d     Wait e0\n", ""), "nothing makes this wait for Alloc"),
    # memories of the host
    "a gradient that is never swapped out": (
        one_gpu,
        change("  d2h     SwapOut dW[2:4]%0\n", ""),
        r"dW\[2:4\]%0 was never swapped out",
    ),
    "weights of two times": (
        one_gpu,
        both(
            change("program host\n", READ_ALL + "  compute Wait e90\nprogram host\n"),
            change(U2, U2 + "  update  Record e91\n  update  Wait e92\n"),
        ),
        r"W\[1:3\] is partly of .* and partly of",
    ),
    "a value that the host does not have": (
        one_gpu,
        both(
            change("Alloc X0@0:2\n  compute Record e1\n", "Alloc X2@0:2\n  compute Record e1\n"),
            change("SwapIn X0@0:2\n  h2d     Record e2\n", "SwapIn X2@0:2\n  h2d     Record e2\n"),
        ),
        "nothing on the host holds X2@0:2",
    ),
    "an older version": (
        one_gpu,
        both(
            change(U2, ""),
            change("program host\n", "program host\n" + U2.replace("dW[2:4]%0 K", "K")),
            change("compute Alloc W[2:4] slot 1\n", f"compute Wait e91\n{ALLOC}"),
            change("K[2:4] W[2:4]\n  update  Wait", f"K[2:4] W[2:4]\n{RECORD}  update  Wait"),
        ),
        r"reads W\[2:4\] of U\[2:4\], not of the start of the step",
    ),
    # the end
    "a part that is never added": (
        replicas,
        change(A2, ""),
        r"dW\[2:4\]%1 is swapped out and never added",
    ),
    "the loss stays on the device": (
        one_gpu,
        change("  d2h     SwapOut X4@0:2\n", ""),
        "X4@0:2, made by .*, never reaches the host",
    ),
    "an update on the host of what is resident": (
        resident,
        lambda text: on_the_host(text),
        r"is made by U\[0:2\], .* on gpu0 is not",
    ),
    "buffers change in another order": (
        changing,
        lambda text: later_first(text),
        r"F\[0:2\]@2:4 does not come after F\[0:2\]@0:2, and both change buffers",
    ),
}


def on_the_host(text: str) -> str:
    """The update of what is resident, and its gradients, on the host."""
    lines = text.splitlines()
    update = next(line for line in lines if "Run U[0:2]" in line)
    lines[lines.index(update)] = "  compute Record e90\n  d2h     Wait e90"
    lines = [line for line in lines if "SwapOut W" not in line]
    lines.insert(lines.index("program host"), "  d2h     SwapOut dW[0:2]%0\n  d2h     Record e91")
    lines += ["  update  Wait e91", update.replace("compute", "update ")]
    return "\n".join(lines)


def later_first(text: str) -> str:
    """The second microbatch of F[0:2] before the first."""
    lines = text.splitlines()
    first, second = (
        next(i for i, line in enumerate(lines) if f"Run F[0:2]@{samples}" in line)
        for samples in ("0:2", "2:4")
    )
    block = lines[first : first + 2]  # the Run, and the Drop of its input
    del lines[first : first + 2]
    lines[second:second] = block
    return "\n".join(lines)


def broken(name: str) -> tuple[Schedule, TaskGraph]:
    made, edit, _ = CASES[name]
    schedule, tasks = made()
    return Schedule.parse(edit(str(schedule))), tasks


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_refused_and_said(name: str) -> None:
    schedule, tasks = broken(name)
    with pytest.raises(ScheduleError, match=CASES[name][2]):
        verify(schedule, tasks.layers, None, tasks.spec.phase, tasks)


def no_program() -> None:
    schedule, tasks = one_gpu()
    verify(replace(schedule, programs=()), tasks.layers, None, Phase.TRAIN, tasks)


def no_operand() -> None:
    schedule, tasks = one_gpu()
    first = schedule.programs[0][0]._replace(ref=None)
    program = (first, *schedule.programs[0][1:])
    verify(replace(schedule, programs=(program,)), tasks.layers, None, Phase.TRAIN, tasks)


def too_small() -> None:
    graph = chain(4)
    tasks = build_tasks(graph, step(4, 2, packs(2), packs(2, 4)))
    schedule = lower(tasks, server(1, memory=400 * 1024), Policy())
    verify(schedule, graph, uniform_costs(graph), Phase.TRAIN, tasks)


def loop() -> tuple[tuple[Schedule, TaskGraph], tuple[Schedule, TaskGraph]]:
    """A forward that leaves one pack's activations on the device and one's on the host."""
    ends = packs(2, 4)
    specs = [
        replace(step(2, 1, ends, ends, phase=phase), saved=ends)
        for phase in (Phase.FORWARD, Phase.BACKWARD)
    ]
    made = [one_gpu(chain(4), spec, Policy(offload=ends[:1])) for spec in specs]
    forward, backward = in_the_same_slots([schedule for schedule, _ in made])
    return (forward, made[0][1]), (backward, made[1][1])


def changed(which: int, **fields: object) -> tuple[Schedule, TaskGraph]:
    """The forward (0) or the backward (1) of a loop, whose device is another."""
    schedule, tasks = loop()[which]
    device = replace(schedule.devices[0], **fields)  # type: ignore[arg-type]
    return replace(schedule, devices=(device,)), tasks


def refused(schedule: Schedule, tasks: TaskGraph) -> None:
    verify(schedule, tasks.layers, None, tasks.spec.phase, tasks)


def nothing_left() -> None:
    """The backward finds what its forward says nothing of; alone, each is right."""
    backward = loop()[1]
    refused(*backward)
    check_together(changed(0, left=())[0], backward[0])


def other_slots() -> None:
    check_together(changed(0, weight_slots=Slots(3, 1))[0], loop()[1][0])


def not_on_the_host() -> None:
    forward = loop()[0][0]
    out = tuple(item for item in forward.programs[0] if item.op is not Op.SWAP_OUT)
    check_together(replace(forward, programs=(out,)), loop()[1][0])


def left_but_dropped() -> None:
    schedule, tasks = changed(0, left=(*loop()[0][0].devices[0].left, SAVED))
    refused(schedule, tasks)


def neither_left_nor_out() -> None:
    schedule, tasks = changed(0, left=())
    drops = [Instruction("compute", Op.DROP, ref=ref) for ref in loop()[0][0].devices[0].left]
    refused(replace(schedule, programs=((*schedule.programs[0], *drops),)), tasks)


def weights_are_left() -> None:
    refused(*changed(0, left=(TensorRef.parse("W[0:2]"),)))


def found_and_never_dropped() -> None:
    schedule, tasks = loop()[1]
    kept = schedule.devices[0].found[0]
    program = (i for i in schedule.programs[0] if (i.op, i.ref) != (Op.DROP, kept))
    refused(replace(schedule, programs=(tuple(program),)), tasks)


def found_in_a_whole_step() -> None:
    schedule, tasks = one_gpu()
    device = replace(schedule.devices[0], left=(TensorRef.parse("S[0:2]@0:2"),))
    refused(replace(schedule, devices=(device,)), tasks)


SAVED = TensorRef.parse("S[0:2]@0:1")
"""What goes to the host."""

BY_HAND = {
    nothing_left: (ScheduleError, "to be found on gpu0: no FORWARD leaves it there"),
    other_slots: (ScheduleError, "slots of gpu0 are others"),
    not_on_the_host: (ScheduleError, "comes from the host: no FORWARD leaves it there"),
    left_but_dropped: (ScheduleError, "is to be left on gpu0, and is not there"),
    neither_left_nor_out: (ScheduleError, "never reaches the host"),
    weights_are_left: (ScheduleError, "cannot be left or found"),
    found_and_never_dropped: (ScheduleError, "found there, is never dropped"),
    found_in_a_whole_step: (ScheduleError, "nothing is left or found on a device"),
    no_program: (ScheduleError, "1 devices, and programs for 0"),
    no_operand: (ScheduleError, "Alloc does not say of what"),
    too_small: (DoesNotFitError, "gpu0 needs"),
}
"""What has no text, or is not about a line of it."""


@pytest.mark.parametrize("make", BY_HAND, ids=lambda make: make.__name__)
def test_what_has_no_text_is_refused_too(make: Callable[[], None]) -> None:
    error, why = BY_HAND[make]
    with pytest.raises(error, match=why):
        make()


def raises_of(path: Path) -> dict[int, str]:
    """The lines that the raise statements of a module cover, and their text."""
    found: dict[int, str] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                found[line] = f"{path.name}:{node.lineno}: {ast.unparse(node)}"
    return found


def test_every_refusal_of_the_checker_is_uttered_here() -> None:
    statements = {path: raises_of(path) for path in MODULES}
    left = {text for module in statements.values() for text in module.values()}
    assert len(left) > 30

    def run(name: str) -> None:
        schedule, tasks = broken(name)
        verify(schedule, tasks.layers, None, tasks.spec.phase, tasks)

    attempts = [*((run, name) for name in CASES), *((make, None) for make in BY_HAND)]
    for call, name in attempts:
        try:
            call(name) if name is not None else call()  # type: ignore[call-arg,arg-type]
        except PlanError as error:
            for frame in traceback.extract_tb(error.__traceback__):
                lines = statements.get(Path(frame.filename), {})
                left.discard(lines.get(frame.lineno or 0, ""))
    assert left == set()


def test_more_shared_parameters_than_layers_are_no_error() -> None:
    """The number of a shared parameter says nothing of layers (ALBERT has more of them)."""
    graph = chain(2, tied=True)
    shared = tuple(replace(graph.shared[0], id=i, name=f"tied{i}") for i in range(5))
    layers = tuple(replace(layer, shared=tuple(range(5))) for layer in graph.layers)
    graph = replace(graph, layers=layers, shared=shared)
    schedule, tasks = one_gpu(graph, step(4, 2, packs(1), packs(1, 2)))
    verify(schedule, graph, uniform_costs(graph), Phase.TRAIN, tasks)
