"""Random models, four-tuples and policies for property tests of the planner."""

from __future__ import annotations

from hypothesis import strategies as st

from harmony.core.layergraph import MODEL_INPUT, Layer, LayerGraph, SharedParam, Value
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import Pack, Phase, StepSpec
from harmony.planner.lower.resident import can_stay
from tests.toys import halves, packs


@st.composite
def layer_graphs(draw: st.DrawFn, max_layers: int = 8) -> LayerGraph:
    """Models with skips, several values between layers, tied, frozen and empty layers, and
    inputs that want a gradient."""
    count = draw(st.integers(1, max_layers))
    produced = [MODEL_INPUT] * draw(st.integers(1, 2))
    reads: list[set[int]] = []
    for layer in range(count):
        recent = range(max(0, len(produced) - 3), len(produced))
        chosen = draw(st.sets(st.sampled_from(recent), min_size=1, max_size=2))
        if draw(st.integers(0, 3)) == 0:
            chosen.add(draw(st.integers(0, len(produced) - 1)))
        reads.append(chosen)
        produced += [layer] * draw(st.sampled_from([1, 1, 1, 2]))
    frozen = [draw(st.integers(0, 3)) == 0 for _ in range(count)]
    empty = [draw(st.integers(0, 4)) == 0 for _ in range(count)]
    tied = draw(_tied(count))
    trains = [i in _users(tied) or not (frozen[i] or empty[i]) for i in range(count)]
    grads: list[bool] = []
    for value, producer in enumerate(produced):
        if producer == MODEL_INPUT:
            grads.append(draw(st.integers(0, 2)) == 0)
            continue
        flows = trains[producer] or any(grads[v] for v in reads[producer])
        # Masks and indices carry no gradient, whatever made them.
        grads.append(flows and (value == len(produced) - 1 or draw(st.integers(0, 5)) > 0))
    values = tuple(
        Value(
            v,
            f"v{v}",
            producer,
            tuple(i for i in range(count) if v in reads[i]),
            draw(st.sampled_from([4, 100, 1000])),
            draw(st.sampled_from([0, 0, 64])),
            requires_grad=grads[v],
            is_output=v == len(produced) - 1 or draw(st.integers(0, 9)) == 0,
        )
        for v, producer in enumerate(produced)
    )
    layers = tuple(
        Layer(
            i,
            f"layer{i}",
            "layer",
            (),
            0 if empty[i] else 1000 + i,
            0 if empty[i] or frozen[i] else 1000 + i,
            0 if empty[i] or frozen[i] else 2000 + 2 * i,
            shared=tuple(s.id for s in tied if i in s.layers),
            inputs=tuple(sorted(reads[i])),
            outputs=tuple(v for v, producer in enumerate(produced) if producer == i),
        )
        for i in range(count)
    )
    return LayerGraph(layers, values, tied, loss=len(produced) - 1)


@st.composite
def _tied(draw: st.DrawFn, count: int) -> tuple[SharedParam, ...]:
    found = []
    for index in range(draw(st.sampled_from([0, 0, 1, 2]))):
        layers = draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=3))
        gradient = draw(st.sampled_from([0, 500, 500]))
        users = tuple(sorted(layers))
        found.append(SharedParam(index, f"tied{index}", users, 500, gradient, 2 * gradient))
    return tuple(found)


def _users(tied: tuple[SharedParam, ...]) -> set[int]:
    return {layer for s in tied if s.gradient_nbytes for layer in s.layers}


@st.composite
def partitions(draw: st.DrawFn, end: int) -> tuple[Pack, ...]:
    """Packs that cover layers 0 to ``end - 1``."""
    if end == 0:
        return ()
    inner = draw(st.sets(st.integers(1, end - 1), max_size=4)) if end > 1 else set()
    return packs(*sorted(inner), end)


@st.composite
def specs(draw: st.DrawFn, graph: LayerGraph, replicas: int = 1) -> StepSpec:
    """Four-tuples for a model, of any phase, with equal or unequal microbatch sizes."""
    phase = draw(st.sampled_from([Phase.TRAIN, *Phase]))
    backward = draw(partitions(graph.num_layers))
    end = backward[-1].first if phase is Phase.TRAIN else graph.num_layers
    forward = draw(partitions(end))
    minibatch = draw(st.integers(replicas, 6 * replicas))
    size = draw(st.integers(1, 3))
    factor = draw(st.sampled_from([1, 1, 2])) if phase is Phase.TRAIN else 1
    shares = halves(minibatch, replicas)
    saved: tuple[Pack, ...] = ()
    products: tuple[Pack, ...] = ()
    if phase is Phase.TRAIN and factor == 1 and draw(st.booleans()):
        forward = draw(st.sampled_from([forward, backward[:-1], backward[:-1]]))
        both = sorted(set(forward).intersection(backward))
        saved = tuple(pack for pack in both if draw(st.booleans()))
        known = [pack for pack in both if graph.products_nbytes(pack.first, pack.last, 1)]
        products = tuple(pack for pack in known if draw(st.booleans()))
    late: tuple[Pack, ...] = ()
    if phase is Phase.TRAIN and draw(st.booleans()):
        late = tuple(pack for pack in backward if draw(st.booleans()))
    rounds = 1
    one_by_one = phase is Phase.TRAIN and replicas == 1 and factor == 1 and bool(forward)
    if one_by_one and not graph.orders_microbatches():
        rounds = draw(st.sampled_from(numbers_of_rounds(-(-minibatch // size))))
    made = (minibatch, size * factor, size, forward, backward, shares, phase, saved)
    return StepSpec(*made, late=late, rounds=rounds, products=products)


def numbers_of_rounds(microbatches: int) -> list[int]:
    """Into how many equal rounds, but for the last, some microbatches can be parted."""
    return sorted({-(-microbatches // each) for each in range(1, microbatches + 1)})


@st.composite
def policies(draw: st.DrawFn, graph: LayerGraph, spec: StepSpec) -> Policy:
    """All combinations of small numbers of buffers, and of what a four-tuple may leave behind."""
    may_stay = [p for p in _can_stay(graph, spec) if p not in spec.late]
    resident = tuple(p for p in may_stay if draw(st.integers(0, 2)) == 0)
    slots = st.integers(1, 3)
    return Policy(
        draw(slots),
        draw(slots),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["keep", "swap", "host"])),
        hold=draw(st.integers(0, 3)),
        offload=tuple(pack for pack in spec.kept if draw(st.booleans())),
        resident=resident,
        # What a FORWARD leaves on a device is of use only where its BACKWARD runs.
        mirror=bool(spec.kept or resident) or draw(st.booleans()),
    )


def _can_stay(graph: LayerGraph, spec: StepSpec) -> list[Pack]:
    """Packs that may be resident."""
    if len(spec.shares) > 1 or spec.phase not in (Phase.TRAIN, Phase.INFER):
        return []
    both = set(spec.forward_packs)
    if spec.phase is Phase.TRAIN:
        both &= set(spec.backward_packs)
        both.add(spec.backward_packs[-1])
    return sorted(pack for pack in both if can_stay(graph, pack) is None)
