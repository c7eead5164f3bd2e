"""The checker: every broken schedule is refused, with the line that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from harmony.core.layergraph import LayerGraph
from harmony.errors import DoesNotFitError, PlanError, ScheduleError
from harmony.planner.check.peak import PeakMemory
from harmony.planner.check.verify import verify
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Op, Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, StepSpec, TaskGraph
from harmony.planner.lower.passes import lower
from harmony.planner.predict.memory import Workspace, device_peak
from tests.toys import chain, packs, server, step, uniform_costs, with_products

TRAIN = step(3, 1, packs(2, 4), packs(2, 4, 6))
CASES = {
    "one gpu": (chain(6), TRAIN, 1, Policy()),
    "one gpu, swap, no double buffering": (chain(6), TRAIN, 1, Policy(1, 1, 1, "swap")),
    "pp": (chain(6, tied=True), TRAIN, 2, Policy()),
    "pp over the host": (chain(6), TRAIN, 2, Policy(2, 2, 1, "host")),
    "pp with skips": (chain(6, skips=((0, 4), (1, 5))), TRAIN, 3, Policy(3, 1, 1)),
    "dp, tied": (
        chain(6, tied=True),
        step(4, 1, packs(3), packs(1, 3, 6), replicas=2),
        2,
        Policy(),
    ),
    "dp, many packs": (
        chain(6),
        step(2, 1, packs(5), packs(1, 2, 3, 4, 5, 6), replicas=2),
        2,
        Policy(1, 1, 1),
    ),
    "unequal microbatches": (
        chain(6, frozen=(0, 1)),
        step(4, 2, packs(3, 4), packs(2, 4, 6), backward_size=1),
        2,
        Policy(),
    ),
    "what the forward saved, on the device and on the host": (
        chain(6),
        replace(step(3, 1, packs(2, 3, 4), packs(2, 3, 4, 6)), saved=packs(2, 3, 4)),
        1,
        Policy(hold=2, offload=packs(2)),
    ),
    "results of products, beside what is saved": (
        with_products(chain(4)),
        replace(
            step(2, 1, packs(1, 2), packs(1, 2, 4)),
            saved=packs(1, 2),
            saved_runs=1,
            products=packs(1, 2),
        ),
        1,
        Policy(hold=1, offload=packs(1)),
    ),
    "mirrored": (
        chain(6, skips=((0, 4),)),
        replace(step(3, 1, packs(2, 3, 4), packs(2, 3, 4, 6)), saved=packs(2, 3, 4)[1:]),
        2,
        Policy(hold=1, offload=packs(2, 3)[1:], mirror=True),
    ),
    "resident, one pack of three": (
        chain(6, frozen=(0, 1)),
        step(3, 1, packs(2, 4), packs(2, 4, 6)),
        1,
        Policy(resident=packs(2, 4)[1:]),
    ),
    "resident, all, one frozen": (
        chain(6, frozen=(0, 1)),
        replace(step(3, 1, packs(2, 4), packs(2, 4, 6)), saved=packs(2, 4)),
        2,
        Policy(resident=packs(2, 4, 6), mirror=True),
    ),
    "resident, tied within the pack": (
        chain(6, tied=True),
        step(3, 1, (), packs(6)),
        1,
        Policy(resident=packs(6)),
    ),
    "late updates, one gpu": (
        chain(6, tied=True),
        replace(TRAIN, late=packs(2, 4, 6)),
        1,
        Policy(),
    ),
    "late updates, pp": (
        chain(6),
        replace(step(3, 1, packs(3, 4), packs(2, 4, 6)), late=packs(2, 4)),
        2,
        Policy(),
    ),
    "late updates, dp": (
        chain(6, tied=True),
        replace(step(4, 1, packs(3), packs(1, 3, 6), replicas=2), late=packs(1, 3, 6)),
        2,
        Policy(),
    ),
    "two rings": (
        chain(6, tied=True),
        step(4, 1, packs(2, 4), packs(2, 4, 6), replicas=2),
        4,
        Policy(),
    ),
    "forward": (
        chain(4),
        step(3, 1, packs(2, 4), packs(1, 2, 4), phase=Phase.FORWARD),
        2,
        Policy(),
    ),
    "backward": (
        chain(4, tied=True),
        step(3, 1, packs(2, 4), packs(1, 2, 4), phase=Phase.BACKWARD),
        1,
        Policy(1, 1, 1),
    ),
    "forward that leaves activations": (
        chain(4),
        replace(
            step(2, 1, packs(1, 2, 4), packs(1, 2, 4), phase=Phase.FORWARD), saved=packs(1, 2, 4)
        ),
        1,
        Policy(offload=packs(1)),
    ),
    "backward that finds them": (
        chain(4),
        replace(
            step(2, 1, packs(1, 2, 4), packs(1, 2, 4), phase=Phase.BACKWARD), saved=packs(1, 2, 4)
        ),
        1,
        Policy(offload=packs(1)),
    ),
    "backward that finds some of them, mirrored": (
        chain(4, frozen=(0,)),
        replace(
            step(3, 1, packs(1, 2, 4), packs(1, 2, 4), phase=Phase.BACKWARD),
            saved=packs(1, 2, 4),
            saved_runs=2,
        ),
        2,
        Policy(mirror=True),
    ),
    "backward to an input, read twice": (
        chain(4, input_gradient=True, frozen=(0,), skips=((-1, 2),)),
        step(3, 1, packs(2, 4), packs(1, 2, 4), phase=Phase.BACKWARD),
        2,
        Policy(),
    ),
}


def lowered(
    graph: LayerGraph, spec: StepSpec, n: int, policy: Policy
) -> tuple[Schedule, TaskGraph]:
    tasks = build_tasks(graph, spec)
    return lower(tasks, server(n), policy), tasks


def mutants(schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
    """The schedule without one of its instructions, for each of them."""
    programs = [*schedule.programs, schedule.host]
    for number, program in enumerate(programs):
        for index, removed in enumerate(program):
            changed = list(programs)
            changed[number] = program[:index] + program[index + 1 :]
            mutant = replace(schedule, programs=tuple(changed[:-1]), host=changed[-1])
            yield f"program {number}, {index}: {removed}", mutant


@pytest.mark.parametrize("name", CASES)
def test_no_instruction_can_be_removed(name: str) -> None:
    graph, spec, num_devices, policy = CASES[name]
    schedule, tasks = lowered(graph, spec, num_devices, policy)
    verify(schedule, graph, None, spec.phase, tasks)
    survivors = []
    for removed, mutant in mutants(schedule):
        try:
            verify(mutant, graph, None, spec.phase, tasks)
        except PlanError:
            continue
        survivors.append(removed)
    assert survivors == []


@pytest.mark.parametrize("name", ["one gpu", "pp", "dp, tied"])
def test_drops_and_copies_cannot_come_early(name: str) -> None:
    """Moving a Drop before the Run in front of it, or a Run before its Wait, is refused."""
    graph, spec, num_devices, policy = CASES[name]
    schedule, tasks = lowered(graph, spec, num_devices, policy)
    for number, program in enumerate(schedule.programs):
        for index in range(1, len(program)):
            before, after = program[index - 1], program[index]
            needed = (before.op, after.op) in ((Op.WAIT, Op.RUN), (Op.RUN, Op.RECORD))
            touched = {*before.reads, *before.writes}
            needed |= after.op is Op.DROP and before.op is Op.RUN and after.ref in touched
            if not needed or before.stream != after.stream:
                continue
            swapped = (*program[: index - 1], after, before, *program[index + 1 :])
            programs = list(schedule.programs)
            programs[number] = swapped
            mutant = replace(schedule, programs=tuple(programs))
            with pytest.raises(ScheduleError):
                verify(mutant, graph, None, spec.phase, tasks)


def edited(old: str, new: str) -> tuple[Schedule, TaskGraph]:
    """The golden one-GPU step with one piece of text replaced."""
    schedule, tasks = lowered(chain(4), step(4, 2, packs(2), packs(2, 4)), 1, Policy())
    text = str(schedule)
    assert text.count(old) == 1, text
    return Schedule.parse(text.replace(old, new)), tasks


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("  h2d     Wait e0\n", "", "nothing makes this wait for Alloc"),
        ("compute Alloc W[2:4] slot 1", "compute Alloc W[2:4] slot 0", "still holds"),
        ("compute Alloc W[2:4] slot 1", "compute Alloc W[2:4] slot 7", "bytes in slot 7"),
        ("d2h     SwapOut dW[2:4]%0", "d2h     SwapOut dW[2:4]%0 stage 0", "go to a stage"),
        ("  compute Drop W[2:4]\n", "", "never dropped"),
        ("Record e16", "Record e15", "recorded twice"),
        ("Run U[2:4] (dW[2:4]%0 K", "Run U[2:4] (K", "does not read and write what it should"),
        ("weight_slots=2x131072", "weight_slots=2x131008", "131072 bytes in slot 0"),
        ("d2h     SwapOut X4@0:2\n", "p2p     Send X4@0:2 gpu0\n", "another device"),
    ],
)
def test_the_error_says_what_is_wrong(old: str, new: str, why: str) -> None:
    schedule, tasks = edited(old, new)
    with pytest.raises(ScheduleError, match=why):
        verify(schedule, tasks.layers, None, Phase.TRAIN, tasks)


def test_the_error_shows_the_lines_around_the_wrong_one() -> None:
    schedule, tasks = edited("  compute Drop X0@0:2\n  compute Wait e4\n", "  compute Wait e4\n")
    with pytest.raises(ScheduleError) as error:
        verify(schedule, tasks.layers, None, Phase.TRAIN, tasks)
    assert str(error.value) == (
        "X0@0:2 is still on gpu0\n"
        "  program gpu0, instruction 26:\n"
        "    compute Drop X0@2:4\n"
        "    compute Drop W[0:2]\n"
        "    compute Alloc dW[2:4]%0 slot 0\n"
        "  > compute Alloc X0@0:2\n"
        "    compute Record e7\n"
        "    h2d     Wait e7\n"
        "    h2d     SwapIn X0@0:2"
    )


def test_programs_that_wait_for_each_other_are_a_deadlock() -> None:
    text = """
        schedule minibatch=1
        device gpu0 memory=1 weight_slots=0x0 gradient_slots=0x0 stages=0x0
        device gpu1 memory=1 weight_slots=0x0 gradient_slots=0x0 stages=0x0
        program gpu0
          compute Wait e1
          compute Record e0
        program gpu1
          p2p Wait e0
          p2p Record e1
    """
    with pytest.raises(ScheduleError, match="deadlock") as error:
        verify(Schedule.parse(text), chain(1))
    assert "> compute Wait e1" in str(error.value) and "> p2p     Wait e0" in str(error.value)


def test_a_stale_prefetch_across_an_update_is_refused() -> None:
    """The next step's first layer prefetched before, or after, its update: never in one step."""
    schedule, tasks = lowered(chain(2), step(1, 1, (), packs(2)), 1, Policy())
    text = str(schedule)
    late = "  compute Alloc W[0:2] slot 0\n  compute Record e90\n  h2d     Wait e90\n"
    late += "  h2d     Wait e91\n  h2d     SwapIn W[0:2]\n  h2d     Record e92\n"
    late += "  compute Wait e92\n  compute Drop W[0:2]\nprogram host\n"
    with_wait = text.replace("program host\n", late) + "  update  Record e91\n"
    verify(Schedule.parse(with_wait), tasks.layers, None, Phase.TRAIN, tasks)
    racing = with_wait.replace("  h2d     Wait e91\n", "")
    with pytest.raises(ScheduleError, match=r"nothing makes this wait for (SwapIn W|Run U)"):
        verify(Schedule.parse(racing), tasks.layers, None, Phase.TRAIN, tasks)


def test_a_device_that_is_too_small_is_refused_with_the_bytes() -> None:
    graph = chain(6)
    tasks = build_tasks(graph, TRAIN)
    schedule = lower(tasks, server(1, memory=400 * 1024), Policy())
    with pytest.raises(DoesNotFitError, match=r"gpu0 needs 5\d\d KiB \(slots 512 KiB"):
        verify(schedule, graph, uniform_costs(graph), Phase.TRAIN, tasks)


def test_what_was_measured_is_returned() -> None:
    graph = chain(6)
    schedule, tasks = lowered(graph, TRAIN, 1, Policy())
    checked = verify(schedule, graph, uniform_costs(graph), Phase.TRAIN, tasks)
    assert checked.stash_nbytes == 3 * (1024 + 4)  # X2 for B[2:4], and the loss
    assert checked.peak_at[0].startswith("Run B[")
    assert 4 * 131072 < checked.peak_nbytes[0] < 4 * 131072 + 64 * 1024


def test_what_is_found_counts_from_the_start() -> None:
    graph, spec, num_devices, policy = CASES["backward that finds them"]
    graph = with_products(graph)
    schedule, _ = lowered(graph, spec, num_devices, policy)
    (device,) = schedule.devices
    nbytes = sum(-(-ref.nbytes(graph) // 512) * 512 for ref in device.found)
    assert nbytes > 0
    peak = PeakMemory(schedule, graph, None).of(0)
    without = replace(schedule, devices=(replace(device, found=()),))
    first = next(i for i, s in enumerate(schedule.programs[0]) if s.op is Op.RUN)
    cut = replace(without, programs=(schedule.programs[0][:first],))
    assert peak.values >= nbytes + PeakMemory(cut, graph, None).of(0).values
    assert device_peak(schedule, 0, graph, Workspace(graph, None)).values == peak.values
