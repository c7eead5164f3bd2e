"""What a candidate takes, estimated from its outline: seconds of a step, room on the devices."""

from __future__ import annotations

from dataclasses import replace

from harmony.planner.ir.tasks import Phase, TaskKind
from harmony.planner.search.candidates import Candidate, Layout, Question, finest, microbatch_sizes
from harmony.planner.search.memory_estimate import host_nbytes, peaks_nbytes
from harmony.planner.search.outline import Outline, outline
from harmony.planner.search.sketch import step_s
from harmony.planner.search.trial import for_phase, policy_for, timed_phases

TIGHT = 1.06
"""The footprint is an upper bound: up to this much above the limit is still tried."""


class Estimator:
    """Estimates candidates of one question."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._last: tuple[Candidate, Phase, Outline] | None = None

    def step_s(self, candidate: Candidate) -> float:
        """Seconds of a whole step."""
        total = 0.0
        for phase in timed_phases(candidate.spec.phase):
            policy, shape = policy_for(candidate.policy, phase), self.shape(candidate, phase)
            rounds = for_phase(candidate.spec, phase).rounds
            ends = self._ends(candidate)
            total += step_s(shape, self.question.machine, policy, rounds, ends)
        return max(total, 1e-9)

    def peak_nbytes(self, candidate: Candidate) -> int:
        """Bytes that it needs on the fullest device, from above in nearly all cases."""
        most, spec = 0, candidate.spec
        for phase in timed_phases(spec.phase):
            shape, policy = self.shape(candidate, phase), policy_for(candidate.policy, phase)
            sized = for_phase(spec, phase).first_rounds(1)
            most = max(most, *peaks_nbytes(self.question.packer, shape, sized, policy))
        return most

    def may_fit(self, candidate: Candidate) -> bool:
        """Whether the devices may have the memory for it."""
        return self.peak_nbytes(candidate) <= TIGHT * self.question.memory_nbytes

    def sizes(self, where: Layout) -> tuple[int, ...]:
        """Microbatch sizes worth trying with a layout, large ones first."""

        def fits(size: int) -> bool:
            return self.may_fit(finest(self.question, where, size))

        return microbatch_sizes(self.question, where.share, fits)

    def fits_host(self, candidate: Candidate) -> bool:
        """Whether the host has the memory for it."""
        return self.host_nbytes(candidate) <= self.question.machine.host.memory_nbytes

    def host_nbytes(self, candidate: Candidate) -> int:
        """Bytes of host memory that it needs, about."""
        packer, ends = self.question.packer, self._ends(candidate)
        found = host_nbytes(packer, self.shape(candidate), candidate.spec)
        if ends is not None:  # nothing else takes the memory of what the first round has left
            forward = (s for s in ends.stages if s.kind is TaskKind.FORWARD)
            found += sum(s.outputs * s.num_runs for s in forward)
        if candidate.spec.phase is Phase.BACKWARD and candidate.spec.kept:
            shape = self.shape(candidate, Phase.FORWARD)
            found += shape.replicas * sum(s.outputs * s.num_runs for s in shape.stages)
        return found

    def forward_shape(self, candidate: Candidate) -> Outline:
        """The outline that has the FORWARDs of a candidate."""
        apart = candidate.spec.phase is Phase.BACKWARD
        return self.shape(candidate, Phase.FORWARD if apart else None)

    def _ends(self, candidate: Candidate) -> Outline | None:
        """The outline of the first and last of interleaved rounds, where they leave less."""
        spec = candidate.spec
        if not spec.interleaved or not {*spec.saved} & {*spec.products}:
            return None
        less = tuple(pack for pack in spec.saved if pack not in spec.products)
        ends = replace(spec.first_rounds(1), saved=less, saved_runs=0)
        return outline(self.question.packer, self.question.machine, ends, candidate.policy)

    def shape(self, candidate: Candidate, phase: Phase | None = None) -> Outline:
        """The outline of a round of a candidate; what is asked for again soon is remembered."""
        phase = phase or candidate.spec.phase
        if self._last is None or self._last[0] is not candidate or self._last[1] is not phase:
            spec = for_phase(candidate.spec, phase).first_rounds(1)
            policy = policy_for(candidate.policy, phase)
            shape = outline(self.question.packer, self.question.machine, spec, policy)
            self._last = (candidate, phase, shape)
        return self._last[2]
