"""What is offered for trial: shares, microbatch sizes, the smallest packs, what may be kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harmony.errors import ConfigError, DoesNotFitError
from harmony.planner.ir.policy import LEAN
from harmony.planner.ir.tasks import Phase, TaskKind
from harmony.planner.search.candidates import (
    POLICIES,
    Candidate,
    Question,
    coinciding,
    finest,
    layout,
    microbatch_sizes,
    sizes_that_work,
)
from harmony.planner.search.estimate import Estimator
from harmony.planner.search.keeping import filled
from harmony.planner.search.memory_estimate import peaks_nbytes
from harmony.planner.search.packing import Budget, Packer, check_layers
from harmony.planner.search.search import MOST_SAMPLES, ask
from harmony.planner.search.sketch import sketch
from harmony.planner.search.trial import for_phase, policy_for, timed_phases
from tests.toys import MIB, chain, packs, server, step, uniform_costs

ALL = packs(2, 4, 6, 8)
_CHAIN = chain(8, weight=MIB, per_sample=64 * 1024)
MODEL = replace(
    _CHAIN, layers=tuple(replace(x, saved_nbytes_per_sample=MIB) for x in _CHAIN.layers)
)


def question(minibatch: int = 12, num_devices: int = 2, **options: object) -> Question:
    machine = server(num_devices, memory=64 * MIB)
    devices = tuple(replace(d, update_bytes_per_s=1e10) for d in machine.devices)
    machine = replace(machine, devices=devices)
    return ask(MODEL, uniform_costs(MODEL), machine, minibatch, **options)


def test_the_shares_of_replicas_are_as_equal_as_can_be() -> None:
    where = layout(question(11, 4), 4)
    assert where.shares == ((0, 2), (2, 5), (5, 8), (8, 11))
    assert where.ring == 1
    assert layout(question(11, 4), 2).ring == 2


@pytest.mark.parametrize(
    ("share", "most", "sizes"),
    [
        (8, 99, (8, 4, 2, 1)),
        # Powers of two that divide it, then the largest others, at most seven in all.
        (36, 99, (36, 32, 18, 4, 2, 1)),
        # No power of two divides it: divisors, then powers.
        (15, 99, (15, 8, 5, 4, 3, 1)),
        (8, 3, (2, 1)),
        # Where not even one sample fits, the answer says what is lacking.
        (8, 0, (8, 4, 2, 1)),
        # So many microbatches of one sample would be too many Runs.
        (4096, 9999, (4096, 2048, 1024, 512, 256, 128)),
    ],
)
def test_sizes_of_microbatches_divide_the_share(
    share: int, most: int, sizes: tuple[int, ...]
) -> None:
    assert microbatch_sizes(question(), share, lambda size: size <= most) == sizes


def test_a_size_that_is_given_is_at_most_the_share() -> None:
    asked = question(12, microbatch_size=5)
    assert microbatch_sizes(asked, 12, lambda size: True) == (5,)
    assert microbatch_sizes(asked, 3, lambda size: True) == (3,)


def test_of_a_model_with_sizes_of_its_own_those_work_whose_rest_works_too() -> None:
    model = replace(MODEL, sizes=(2, 3, 5))
    assert sizes_that_work(model, 12) == (2, 3, 5, 12)  # 12 = 5 + 5 + 2
    assert sizes_that_work(model, 13) == (5, 13)  # 13 = 5 + 5 + 3; 2 and 3 leave one sample
    assert sizes_that_work(replace(model, whole_batch="why"), 12) == (12,)


@pytest.mark.parametrize("phase", Phase)
def test_the_smallest_packs_are_the_layers_and_a_training_step_fuses_the_last(
    phase: Phase,
) -> None:
    asked = question(phase=phase)
    found = finest(asked, layout(asked, 1), 2)
    each = packs(*range(1, 9))
    assert found.spec.backward_packs == each
    assert found.spec.forward_packs == (each[:-1] if phase is Phase.TRAIN else each)
    assert found.policy == LEAN


def kept(asked: Question) -> list[Candidate]:
    """All that the candidates with microbatches of two samples may keep."""
    where, estimator, found = layout(asked, 1), Estimator(asked), list[Candidate]()
    for base in coinciding(asked, where, 2, POLICIES[0]):
        found += filled(asked, base, estimator.shape(base), asked.memory_nbytes)
    assert all(estimator.may_fit(candidate) for candidate in found)
    return found


def test_room_is_filled_with_activations_and_weights_unless_all_is_to_be_recomputed() -> None:
    found = kept(question(num_devices=1))
    assert any(candidate.spec.saved for candidate in found)
    assert any(candidate.policy.resident for candidate in found)
    lean = kept(question(num_devices=1, activations="recompute"))
    assert any(candidate.policy.resident for candidate in lean)
    assert not any(candidate.spec.saved for candidate in lean)


def test_a_layer_that_needs_exactly_the_limit_fits_and_with_a_byte_less_it_does_not() -> None:
    packer = Packer(MODEL, uniform_costs(MODEL))
    any_size = Budget(10**12, LEAN)
    each = packs(*range(1, 9))
    most = max(packer.need(TaskKind.BACKWARD, pack, 1, any_size).nbytes for pack in each)
    check_layers(packer, 1, Budget(most, LEAN))
    with pytest.raises(DoesNotFitError, match="alone needs"):
        check_layers(packer, 1, Budget(most - 1, LEAN))


def test_a_step_of_ones_own_loop_is_a_forward_of_all_packs_and_a_backward() -> None:
    train = replace(step(12, 4, ALL[:-1], ALL, backward_size=2), saved_runs=0)
    forward, backward = (for_phase(train, phase) for phase in (Phase.FORWARD, Phase.BACKWARD))
    assert for_phase(train, Phase.TRAIN) is train
    assert forward.forward_packs == backward.forward_packs == ALL
    assert forward.forward_size == backward.backward_size == 2
    saved = for_phase(replace(step(12, 2, ALL[:-1], ALL), saved=ALL[:1]), Phase.FORWARD)
    assert not saved.saved and saved.phase is Phase.FORWARD
    assert timed_phases(Phase.TRAIN) == (Phase.TRAIN,)
    assert timed_phases(Phase.BACKWARD) == (Phase.FORWARD, Phase.BACKWARD)


def test_a_loop_of_ones_own_takes_the_time_and_the_most_memory_of_its_two_phases() -> None:
    asked = question(phase=Phase.BACKWARD)
    estimator, candidate = Estimator(asked), finest(asked, layout(asked, 1), 2)
    seconds, peaks = [], []
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        shape = estimator.shape(candidate, phase)
        assert len(shape.stages) == 8
        assert {s.kind is TaskKind.BACKWARD for s in shape.stages} == {phase is Phase.BACKWARD}
        policy = policy_for(candidate.policy, phase)
        seconds.append(sketch(shape, asked.machine, policy).step_s)
        spec = for_phase(candidate.spec, phase)
        peaks.append(max(peaks_nbytes(asked.packer, shape, spec, policy)))
    assert estimator.step_s(candidate) == pytest.approx(sum(seconds))
    assert estimator.peak_nbytes(candidate) == max(peaks)
    assert estimator.shape(candidate).stages == shape.stages


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"minibatch": MOST_SAMPLES}, False),
        ({"minibatch": MOST_SAMPLES + 1}, True),
        ({"minibatch": 1}, False),
        ({"minibatch": 0}, True),
        ({"num_packs": 1}, False),
        ({"num_packs": 8}, False),
        ({"num_packs": 0}, True),
        ({"num_packs": 9}, True),
        ({"microbatch_size": 1}, False),
        ({"microbatch_size": 0}, True),
    ],
)
def test_options_are_refused_just_outside_of_their_range(
    options: dict[str, int], refused: bool
) -> None:
    if refused:
        with pytest.raises(ConfigError):
            question(**options)
    else:
        question(**options)
