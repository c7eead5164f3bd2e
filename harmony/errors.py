"""The exceptions that Harmony raises; every message carries the values and the remedy.

HarmonyError
 |- ConfigError          an option that makes no sense, before anything ran
 |   `- ArgumentError    an argument that a function does not have; a TypeError, too
 |- CaptureError         the model cannot be turned into layers; names the layer
 |- PlanError            no valid plan
 |   |- DoesNotFitError  a layer, or the whole model, is larger than a limit
 |   `- ScheduleError    a schedule that the checker refuses; shows the line
 |- ExecutionError       a task failed while it ran; names the task
 |   |- DeviceLostError  a GPU stopped for good: the process has to be started again
 |   `- PeerError        another process that trains the model failed, or is gone
 |- NonFiniteError       a loss or a gradient is infinite or NaN; names what made it first
 |- NotSavedError        a checkpoint that could not be written; those before it are whole
 |- RecomputeError       a layer does not compute the same twice; names the layer
 |- RaceError            two accesses to the same memory that no event orders
 `- VirtualGPUError      the virtual GPU could not be built, loaded or configured
"""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with every character escaped that a terminal would obey and not show.

    Messages quote names of files and of what is in them, which are not ours.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class HarmonyError(Exception):
    """Base of everything that Harmony raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


class HarmonyWarning(UserWarning):
    """What Harmony wants to be known, though it goes on."""


class ConfigError(HarmonyError, ValueError):
    """An option with an impossible value."""


class ArgumentError(ConfigError, TypeError):
    """An argument that there is not, one too many, or one that is missing."""


class CaptureError(HarmonyError):
    """The model's forward cannot be recorded as layers."""


class PlanError(HarmonyError):
    """No plan can be made, or a plan does not match the model or the machine."""


class DoesNotFitError(PlanError):
    """Something is larger than the memory it has to fit in."""


class ScheduleError(PlanError):
    """A schedule that would read what is not there, overflow a memory, or race."""


class ExecutionError(HarmonyError):
    """A task of the schedule failed.

    Attributes:
        task: the text of the task or instruction that failed, e.g. ``"B[4:8]@0:4"``.
        torn: whether some parameters were updated before it failed, and others were not.
    """

    def __init__(self, message: str, task: str = "", *, torn: bool = False) -> None:
        super().__init__(message)
        self.task = task
        self.torn = torn


class DeviceLostError(ExecutionError):
    """A GPU has stopped, and with it everything of this process on all of them."""


class PeerError(ExecutionError):
    """Another of the processes that train one model has failed, or is gone."""


class NonFiniteError(HarmonyError):
    """A loss or a gradient is not finite; nothing was updated."""


class NotSavedError(HarmonyError):
    """A checkpoint could not be written: the disk is full, broken, or not there any more."""


class RecomputeError(HarmonyError):
    """A layer's recompute differed from its forward."""


class RaceError(HarmonyError):
    """Conflicting memory accesses that no event orders."""


class VirtualGPUError(HarmonyError):
    """The virtual GPU could not be built, loaded or configured."""


def text_of(error: BaseException) -> str:
    """What an exception says; some have a text that raises by itself."""
    try:
        return str(error)
    except BaseException as another:
        return f"(its text cannot be had: {type(another).__name__})"
