"""Options of the command line, which every model of the script reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harmony.core.units import parse_period
from harmony.errors import ConfigError

MODES = ("auto", "pp", "dp")
"""How packs and batches are spread over the GPUs: pipeline, data parallel, or the faster."""

ACTIVATIONS = ("auto", "recompute")
"""What becomes of what a backward needs: whatever is faster, or always recomputed."""

UPDATES = ("auto", "host")
"""Where optimizers run: where packs stay on a GPU there, or all on the host."""

PRECISIONS = ("fp32", "bf16", "fp16")
"""What a model can compute in (see `harmony.engine.precision`)."""

MOST = 10**18
"""Steps: more than anybody trains."""


@dataclass(frozen=True)
class Every:
    """How often something is done: after so many steps, or once so much time has passed."""

    steps: int | None = None
    seconds: float | None = None

    @staticmethod
    def of(every: int | str | None) -> Every:
        """``100`` or ``"100"`` steps, ``"15m"``; None: 30 minutes.

        Raises:
            ConfigError: if it is neither.
        """
        if every is None:
            return Every(seconds=1800.0)
        steps = int(every) if isinstance(every, str) and every.isdecimal() else every
        if isinstance(steps, int) and 1 <= steps <= MOST and not isinstance(steps, bool):
            return Every(steps=steps)
        try:
            return Every(seconds=parse_period(str(every)))
        except ConfigError:
            raise ConfigError(
                f"{str(every)[:40]!r} is neither a number of steps (100) nor a time (30s, 15m, 2h)"
            ) from None


WATCHDOG = "HARMONY_WATCHDOG"
"""The variable that sets the watchdog of models that set none."""


@dataclass(frozen=True)
class Watch:
    """After how long a step in which nothing moves is reported.

    Attributes:
        seconds: without any instruction that begins or ends.
        ends: whether the process ends then.
    """

    seconds: float
    ends: bool = False

    @staticmethod
    def of(text: float | str | None) -> Watch | None:
        """``600``, ``"600"`` or ``"10m"``, with ``",end"`` to end then; None, ``"off"``: no watch.

        Raises:
            ConfigError: if it is none of these.
        """
        given = str(text).replace(" ", "").lower()
        if text is None or given in ("", "off", "none"):
            return None
        time, _, rest = given.partition(",")
        try:
            seconds = parse_period(f"{time}s" if time[-1:].isdigit() else time)
        except ConfigError:
            seconds = 0.0
        if not seconds or rest not in ("", "end"):
            raise ConfigError(
                f"watchdog={str(text)[:40]!r}: seconds (600) or a time (10m), and ',end' if the "
                "process is to end then"
            )
        return Watch(seconds, rest == "end")


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None means that Harmony decides.

    Attributes:
        gpus: how many GPUs to use.
        gpu_memory_nbytes: bytes that Harmony may use on each.
        mode: ``"auto"``, ``"pp"`` or ``"dp"``.
        virtual: whether the GPUs are virtual ones.
        plan_only: stop at the first plan, before anything is trained.
        verify: run the first step by plain PyTorch as well, compare, and stop.
        report: a file that gets the report as well.
        link: bandwidth of a virtual GPU's link, as text, e.g. ``"8GB/s"``.
        host_memory_nbytes: bytes of host memory that Harmony may use.
        active: whether `harmony-run` runs the script.
        gpu, host, topology: plan for a machine of the catalog instead of this one.
        explain: show why everything was decided as it was.
        as_json: show the plan as JSON.
        plan: a file with the plan to train by.
        save_plan, save_profile: files that get the first plan, and the layers and their costs.
        replan: whether the plan may change between two steps.
        overlap_updates: whether updates may run into the next step.
        precision: in which type every model computes; None: as it says itself.
        cache: whether measurements of earlier runs may be used, and kept.
        checkpoint_dir: a folder that gets the checkpoints of the script's `harmony.Run`.
        checkpoint_every: how often it saves one.
        keep: how many of them are kept.
        resume: where it goes on from: a folder, or ``"auto"``: the newest that is whole there,
            or the start, if there is none.
        async_save: whether training goes on while it saves.
    """

    gpus: int | None = None
    gpu_memory_nbytes: int | None = None
    mode: str = "auto"
    virtual: bool = False
    plan_only: bool = False
    verify: bool = False
    report: Path | None = None
    link: str | None = None
    host_memory_nbytes: int | None = None
    active: bool = False
    gpu: str | None = None
    host: str | None = None
    topology: str | None = None
    explain: bool = False
    as_json: bool = False
    plan: Path | None = None
    save_plan: Path | None = None
    save_profile: Path | None = None
    cache: bool = True
    replan: bool = True
    overlap_updates: bool = False
    precision: str | None = None
    checkpoint_dir: Path | None = None
    checkpoint_every: Every | None = None
    keep: int | None = None
    resume: str | None = None
    async_save: bool = False


_current = Options()


def current_options() -> Options:
    """Options of the running session; the defaults where `harmony-run` runs nothing."""
    return _current


def use(options: Options) -> None:
    """Make ``options`` those of the running session."""
    global _current
    _current = options
