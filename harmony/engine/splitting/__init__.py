"""Whether a batch may be parted: tried, on values of the first batch of each signature.

A few samples run together and in parts, layer by layer (`trial`): what a layer makes of a sample
may not depend on the others (`samples` says which those are), and the loss and its gradients have
to be those of the parts put together by a rule (`losses`).
"""

from __future__ import annotations

from harmony.engine.splitting.known import Splitting
from harmony.engine.splitting.probe import Verdict

__all__ = ["Splitting", "Verdict"]
