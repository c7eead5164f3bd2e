"""Which parameters a loss depends on: by autograd's own graph, and by the trace.

Where the two differ, a gradient would be lost without a word; so they are compared for each trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from harmony.capture.graph.trace import Trace, ValueRef
from harmony.errors import CaptureError


def check_reach(
    trace: Trace, outputs: Iterable[object], names: Mapping[int, str], trained: Iterable[str]
) -> None:
    """Refuse a trace that does not lead to a parameter to which autograd's graph leads.

    Args:
        outputs: what the forward returned, with its graph.
        names: of the parameters, by the id of the tensor that stood for them.
        trained: names of the parameters that require a gradient.

    Raises:
        CaptureError: naming the parameters.
    """
    roots = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]
    lost = by_graph(roots, names).intersection(trained) - by_trace(trace)
    if lost:
        listed = ", ".join(sorted(lost)[:5])
        raise CaptureError(
            f"{len(lost)} parameters get a gradient in plain PyTorch that the recording has lost "
            f"the way to ({listed}): something between them and the loss runs where a recording "
            "does not see it. Call that inside a module without children"
        )


def by_graph(roots: Iterable[torch.Tensor], names: Mapping[int, str]) -> set[str]:
    """Names of the parameters that a backward from some tensors would reach."""
    pending = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen, found = set(pending), set()
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)  # of the node that adds to ``grad``
        if variable is not None and id(variable) in names:
            found.add(names[id(variable)])
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return found


def by_trace(trace: Trace) -> set[str]:
    """Names of parameters and buffers that are used on the way to an output that learns.

    Values go by their memory: what is written through one name of it is read by another.
    """
    values = trace.values
    outputs = (leaf.id for leaf in trace.outputs if isinstance(leaf, ValueRef))
    wanted = {values[n].storage for n in outputs if values[n].requires_grad}
    found: set[str] = set()
    for step in reversed(trace.steps):
        learns = (values[n].storage for n in step.made if values[n].requires_grad)
        if wanted.isdisjoint(learns):
            continue
        found.update(step.state)
        wanted.update(values[n].storage for n in step.inputs if values[n].requires_grad)
    return found
