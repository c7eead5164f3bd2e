"""Where each tensor lies in an arena."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from harmony.capture.graph.params import ParamInfo
from harmony.core.units import aligned
from harmony.runtime.host.pinned_memory import Place


@dataclass
class Region:
    """A contiguous range of an arena: one layer, or one shared parameter."""

    low: int
    high: int
    places: dict[str, Place] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the range."""
        return self.high - self.low


class ArenaLayout:
    """Where everything lies in one arena: layers in order, then shared parameters, then the rest.

    Attributes:
        layers: region of each layer.
        shared: region of each shared parameter.
        rest: region of what no layer uses.
        places: of all of these, by name.
        nbytes: bytes of the arena.
    """

    def __init__(self, tensors: Iterable[ParamInfo], num_layers: int, num_shared: int) -> None:
        by_layer: dict[int, list[ParamInfo]] = {}
        by_shared: dict[int, list[ParamInfo]] = {}
        rest: list[ParamInfo] = []
        self._tensors = list(tensors)
        for tensor in self._tensors:
            if tensor.shared_id is not None:
                by_shared.setdefault(tensor.shared_id, []).append(tensor)
            elif tensor.layer is not None:
                by_layer.setdefault(tensor.layer, []).append(tensor)
            else:
                rest.append(tensor)
        self.nbytes = 0
        self.layers = [self._region(by_layer.get(i, ())) for i in range(num_layers)]
        self.shared = [self._region(by_shared.get(i, ())) for i in range(num_shared)]
        self.rest = self._region(rest)
        self.places = {
            name: place
            for region in (*self.layers, *self.shared, self.rest)
            for name, place in region.places.items()
        }

    def _region(self, tensors: Iterable[ParamInfo]) -> Region:
        region = Region(self.nbytes, self.nbytes)
        for tensor in tensors:
            place = Place(region.high, tuple(tensor.shape), tuple(tensor.stride), tensor.dtype)
            region.places[tensor.name] = place
            region.high += aligned(place.nbytes)
        self.nbytes = region.high
        return region

    def only(self, names: Container[str]) -> ArenaLayout:
        """Return the layout of some of the tensors, in the same order."""
        chosen = [tensor for tensor in self._tensors if tensor.name in names]
        return ArenaLayout(chosen, len(self.layers), len(self.shared))

    def masters(self) -> ArenaLayout:
        """Return the layout of the masters of those tensors that have one, in the same order."""
        masters = [tensor.as_master() for tensor in self._tensors if tensor.master is not None]
        return ArenaLayout(masters, len(self.layers), len(self.shared))

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Byte range of layers ``first`` to ``last - 1``."""
        return self.layers[first].low, self.layers[last - 1].high

    def in_slot(
        self, first: int, last: int, shared: Iterable[int]
    ) -> dict[str, tuple[int, Place]]:
        """Offsets within a slot of everything a pack keeps there: its layers, then shared ones."""
        low, high = self.span(first, last)
        found = {
            name: (place.offset - low, place)
            for region in self.layers[first:last]
            for name, place in region.places.items()
        }
        base = aligned(high - low)
        for index in shared:
            region = self.shared[index]
            for name, place in region.places.items():
                found[name] = (base + place.offset - region.low, place)
            base += aligned(region.nbytes)
        return found

    def shared_offset(self, first: int, last: int, shared: Iterable[int], index: int) -> int:
        """Offset within a slot of one of the shared parameters of a pack."""
        low, high = self.span(first, last)
        base = aligned(high - low)
        for other in shared:
            if other == index:
                break
            base += aligned(self.shared[other].nbytes)
        return base
