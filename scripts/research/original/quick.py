"""A step's time without prefetch in closed form, task by task instead of event by event.

Without prefetch a GPU does one thing at a time, so with equal microbatches a task ends each
microbatch a fixed period after the one before, or as long after its input arrived as its work
takes. When microbatches arrive is then a convex function of their number, and so is when they
leave: the first and the last say it all. Left out are copies to another GPU's side of the host
that are late, which hardly ever hold anything up; `estimator` has the last word.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from harmony.errors import PlanError
from harmony.planner.ir.tasks import TaskKind
from research.original.estimator import Server
from research.original.four_tuple import Mode
from research.original.profile import PaperProfile
from research.original.ranges import Weight

Cuts = Sequence[int]
"""Where packs begin, and the end of the last."""


class Question:
    """What is asked for: model, mode, GPUs, minibatch, memory; and what follows from that alone.

    Attributes:
        replicated: whether all GPUs do the same (DP, or one GPU).
        share: samples of a step that a GPU sees.
        ring: GPUs that take turns.
    """

    def __init__(
        self,
        profile: PaperProfile,
        mode: Mode,
        num_gpus: int,
        minibatch: int,
        memory_nbytes: int,
        server: Server,
    ) -> None:
        self.profile = profile
        self.mode: Mode = mode
        self.num_gpus = num_gpus
        self.minibatch = minibatch
        self.memory_nbytes = memory_nbytes
        self.server = server
        self.replicated = mode == "DP" or num_gpus == 1
        self.share = minibatch // num_gpus if self.replicated else minibatch
        if min(num_gpus, minibatch) < 1 or (self.replicated and minibatch % num_gpus):
            raise PlanError(f"{num_gpus} GPUs get no equal shares of {minibatch} samples")
        self.ring = 1 if self.replicated else num_gpus

    def swap_s_per_byte(self, num_tasks: int) -> float:
        """Seconds a byte of a copy between host and GPU takes in a step of so many tasks."""
        in_use = self.num_gpus if self.replicated else min(self.num_gpus, num_tasks)
        return in_use / self.server.swap_bytes_per_s

    def work_s(self, kind: TaskKind, size: int) -> Weight:
        """Seconds that one task keeps its GPU busy, by its pack: at least, in a pipeline.

        What a FORWARD stashes for a BACKWARD pack counts for that pack. Where all GPUs do the
        same these sum up to the step, but for updates that wait for each other.
        """
        profile, share, deletion_s = self.profile, self.share, self.server.deletion_s
        entered, moved, updated = profile.input_nbytes, profile.moved_nbytes, profile.updated_s
        swap, peer = self.swap_s_per_byte(self.num_gpus), 1.0 / self.server.peer_bytes_per_s
        is_backward = kind is TaskKind.BACKWARD
        sized = profile.sized(size, backward=is_backward)
        run_s = list(sized.forward_s)
        if is_backward:
            run_s = [a + b for a, b in zip(run_s, sized.backward_s, strict=True)]
        count, end = share // size, profile.num_layers
        replicated = self.replicated
        reduce = 2 * (self.num_gpus - 1) / self.num_gpus * peer if replicated else 0.0
        hand = swap if replicated else peer

        def work(first: int, last: int) -> float:
            nbytes = moved[last] - moved[first]
            seconds = swap * nbytes + count * (run_s[last] - run_s[first]) + deletion_s
            leaving = entered[last] if last < end else 0
            received = entered[first] * (hand if first else swap)
            if not is_backward:
                return seconds + share * (received + (swap * leaving if replicated else 0.0))
            seconds += (swap + reduce) * nbytes
            if replicated and not first:
                seconds += max(0.0, updated[last] - deletion_s)
            if last == end:
                # Its input comes from the FORWARD before it, or is the data.
                handed_back = swap * entered[first] if replicated and first else 0.0
                return seconds + share * (received + handed_back)
            stashed = 2 * swap * entered[first]
            handed_back = swap * entered[first] if replicated and first else 0.0
            return seconds + share * (stashed + hand * leaving + handed_back)

        return work


class Quick:
    """Times packings of one question at one pair of microbatch sizes."""

    def __init__(self, question: Question, forward_size: int, backward_size: int) -> None:
        profile, share = question.profile, question.share
        self.question = question
        self.sizes = (forward_size, backward_size)
        self.counts = (share // forward_size, share // backward_size)
        self.forward_s = profile.sized(forward_size, backward=False).forward_s
        sized = profile.sized(backward_size)
        self.recompute_s, self.backward_s = sized.forward_s, sized.backward_s
        self._stashes: tuple[Cuts, list[int]] = ([], [])

    def step_s(self, forward: Cuts, backward: Cuts) -> float:
        """Seconds of a step with these packs."""
        if self.question.replicated:
            return self._replicated_s(forward, backward)
        return self._ring_s(forward, backward)

    def stash_sums(self, backward: Cuts) -> list[int]:
        """Per place, bytes a sample of the stashes of all layers before it."""
        if self._stashes[0] != backward:
            entered = self.question.profile.input_nbytes
            marked = [0] * backward[-2]
            for first in backward[:-2]:
                marked[first] = entered[first]
            self._stashes = (backward, [0, *accumulate(marked)])
        return self._stashes[1]

    def _replicated_s(self, forward: Cuts, backward: Cuts) -> float:
        """All GPUs do the same, one thing after the other; only updates run beside it."""
        question, profile = self.question, self.question.profile
        entered, moved, server = profile.input_nbytes, profile.moved_nbytes, question.server
        swap = question.swap_s_per_byte(0)
        num_gpus, share = question.num_gpus, question.share
        reduce = 2 * (num_gpus - 1) / num_gpus / server.peer_bytes_per_s
        stashed = self.stash_sums(backward)
        now = updated = 0.0
        for first, last in pairwise(forward):
            copied = entered[first] + entered[last] + stashed[last] - stashed[first]
            now += swap * (moved[last] - moved[first] + share * copied) + server.deletion_s
            now += self.counts[0] * (self.forward_s[last] - self.forward_s[first])
        for at in range(len(backward) - 2, -1, -1):
            first, last = backward[at], backward[at + 1]
            copied = entered[first] * (2 if first else 1)
            copied += entered[last] if last < len(entered) else 0
            weights = moved[last] - moved[first]
            now += swap * (2 * weights + share * copied) + reduce * weights
            now += self.counts[1] * (self.recompute_s[last] - self.recompute_s[first])
            now += self.counts[1] * (self.backward_s[last] - self.backward_s[first])
            updated = max(updated, now) + profile.updated_s[last] - profile.updated_s[first]
            now += server.deletion_s
        return max(now, updated)

    def _ring_s(self, forward: Cuts, backward: Cuts) -> float:
        """Pack i on GPU i mod N."""
        question, profile = self.question, self.question.profile
        entered, moved = profile.input_nbytes, profile.moved_nbytes
        ring, deletion_s = question.ring, question.server.deletion_s
        swap = question.swap_s_per_byte(len(forward) + len(backward) - 2)
        peer = 1.0 / question.server.peer_bytes_per_s
        size, count = self.sizes[0], self.counts[0] - 1
        free, updated = [0.0] * ring, [0.0] * ring
        stashed = self.stash_sums(backward)
        is_local = self.sizes[0] == self.sizes[1]
        first_s = last_s = held_s = 0.0
        task = 0
        for first, last in pairwise(forward):
            gpu = task % ring
            ready = free[gpu] + swap * (moved[last] - moved[first])
            held_s = self.forward_s[last] - self.forward_s[first]
            held_s += size * swap * (stashed[last] - stashed[first])
            if first:
                period = held_s + size * peer * entered[first]
                first_s = (ready if ready > first_s else first_s) + period
            else:
                period = held_s + size * swap * entered[0]
                first_s = ready + period
            last_s = max(first_s + count * period, last_s + period if first else 0.0)
            if not is_local and task == len(forward) - 2 and stashed[first + 1] > stashed[first]:
                # The next stash queues behind outputs on their way to be regrouped.
                rate = peer * entered[first] if first else swap * entered[0]
                late = max(0.0, swap * entered[last] - rate)
                last_s = max(last_s, first_s + count * (period + size * late))
            free[gpu] = last_s + deletion_s
            task += 1
        if task and not is_local:
            first_s, last_s = self._regrouped(first_s, last_s, swap, entered[backward[-2]])
        size, count = self.sizes[1], self.counts[1] - 1
        for at in range(len(backward) - 2, -1, -1):
            first, last = backward[at], backward[at + 1]
            gpu = task % ring
            weights_s = swap * (moved[last] - moved[first])
            recompute_s = self.recompute_s[last] - self.recompute_s[first]
            backward_s = self.backward_s[last] - self.backward_s[first]
            ready = free[gpu] + weights_s
            if at == len(backward) - 2:
                rate = peer if task and is_local else swap
                period = work = recompute_s + backward_s + size * rate * entered[first]
            else:
                ready += recompute_s + size * swap * entered[first]
                work = backward_s + size * peer * entered[last]
                period = work + recompute_s + size * swap * entered[first]
            first_s = (ready if ready > first_s else first_s) + work
            last_s = max(first_s + count * period, last_s + work)
            done_s = last_s + weights_s
            update_s = profile.updated_s[last] - profile.updated_s[first]
            updated[gpu] = max(updated[gpu], done_s) + update_s
            free[gpu] = done_s + deletion_s
            task += 1
        return max(max(updated), max(free))

    def _regrouped(
        self, first_s: float, last_s: float, swap: float, nbytes: int
    ) -> tuple[float, float]:
        """When the first and the last BACKWARD microbatch are on the host, regrouped."""
        (forward_size, backward_size), counts = self.sizes, self.counts
        in_use = swap * self.question.server.swap_bytes_per_s
        message = 2 * backward_size * nbytes * in_use / self.question.server.message_bytes_per_s
        at = -(-backward_size // forward_size) - 1
        if counts[0] > 1:
            first_s += at * (last_s - first_s) / (counts[0] - 1)
        copied = forward_size * nbytes * swap
        last_s = max(first_s + counts[1] * message, last_s + message)
        return first_s + copied + message, last_s + copied
