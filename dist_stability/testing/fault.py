"""What a fault is: plain data, checked when it is made, and the same thing as text for a command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dist_stability import watch

PHASES = watch.PHASES[watch.PHASES.index("gradients") :]
"""The phases of a guarded step, in order; see the controller's phase listeners. What lies before and between steps,
"preflight" and "training", is not the controller's to break."""

LOSS_PHASES = ("loss before forward", "loss in forward", "loss after forward")
"""Places inside the probe's loss function; reached through :meth:`FaultInjector.wrap_loss` only."""

TIER_PHASES = ("seal",)
"""While a commit is made findable for a later process; reached with ``persist`` only."""

PROCESS_KINDS = ("kill", "stop", "exit")
"""Kinds that end or hold this process."""

BITS = ("sign", "top-exponent", "low-exponent", "top-mantissa", "low-mantissa")
"""Names of bits of a floating-point number, whatever its width."""

PLACES = {"gradient": "gradients", "parameter": "after step", "snapshot": "gradients"}
"""Where a bit can be flipped, and in which phase that happens."""

KEYS = {
    "gradient-scale": ("step", "factor", "length", "rank"),
    "nan": ("step", "rank", "length"),
    "inf": ("step", "rank", "length"),
    "bit-flip": ("step", "rank", "where", "bit", "length"),
    "raise": ("step", "phase", "rank", "length"),
    "sleep": ("step", "phase", "rank", "seconds", "length"),
    "kill": ("step", "phase", "rank"),
    "stop": ("step", "phase", "rank"),
    "exit": ("step", "phase", "rank", "code"),
    "shuffled-labels": ("step", "length", "rank"),
    "learning-rate": ("step", "factor", "length", "rank"),
}
"""For each kind of fault, the keys of its text; the rest of :class:`Fault` does not apply to it."""

KINDS = tuple(KEYS)
"""Names of all kinds of faults."""

OUTSIDE = {"shuffled-labels": "batch", "learning-rate": "optimizer"}
"""Kinds that act where the controller has no phase: on the batch before its forward, around ``optimizer.step()``."""

DRAWN_KINDS = tuple(kind for kind in KINDS if kind not in OUTSIDE)
"""What :meth:`FaultInjector.random` draws from unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; ``str(fault)`` is the text :func:`parse` reads.

    Attributes:
        kind: One of :data:`KINDS`.
        step: First attempt it acts in.
        phase: One of :data:`PHASES`, :data:`LOSS_PHASES` or :data:`TIER_PHASES`. Faults in numbers set it themselves:
            they act on "gradients", a bit flip in a parameter "after step", those of :data:`OUTSIDE` where it says.
        rank: Global rank it acts on; None for every rank.
        length: Number of consecutive attempts it acts in.
        factor: What gradients ("gradient-scale") or learning rates ("learning-rate") are multiplied by.
        where: "gradient", "parameter" or "snapshot" ("bit-flip"): the largest element of this rank's shards is hit.
        bit: One of :data:`BITS` ("bit-flip").
        seconds: How long to sleep ("sleep").
        code: Exit status ("exit").
    """

    kind: str
    step: int
    phase: str = "gradients"
    rank: int | None = None
    length: int = 1
    factor: float = 300.0
    where: str = "gradient"
    bit: str = "top-exponent"
    seconds: float = 1.0
    code: int = 1

    def __post_init__(self) -> None:
        """Refuse what could never fire."""
        one_of("kind of fault", self.kind, KINDS)
        one_of("place of a bit flip", self.where, tuple(PLACES))
        one_of("bit", self.bit, BITS)
        if "phase" in KEYS[self.kind]:
            one_of("phase", self.phase, PHASES + LOSS_PHASES + TIER_PHASES)
        else:
            phase = PLACES[self.where] if self.kind == "bit-flip" else OUTSIDE.get(self.kind, "gradients")
            object.__setattr__(self, "phase", phase)
        if self.step < 0 or self.length < 1:
            raise ValueError(f"fault {self.kind}: step must be >= 0 and length >= 1, got {self.step} and {self.length}")

    def __str__(self) -> str:
        """The fault as text, e.g. ``gradient-scale:step=120,factor=300,length=10``."""
        default = {f.name: f.default for f in fields(self)}
        shown = [k for k in KEYS[self.kind] if k in ("step", "phase") or getattr(self, k) != default[k]]
        return f"{self.kind}:" + ",".join(f"{k}={str(getattr(self, k)).replace(' ', '-')}" for k in shown)

    def due(self, rank: int, step: int, phase: str) -> bool:
        """Whether it acts on this rank, in this attempt and phase."""
        return phase == self.phase and self.step <= step < self.step + self.length and self.rank in (None, rank)


def one_of(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse a name that is not known; the error lists the known ones."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")


def parse(spec: str) -> Fault:
    """Read ``kind:key=value,...``.

    Raises:
        ValueError: Unknown kind, key or value; the message lists the known ones.
    """
    kind, _, rest = spec.partition(":")
    one_of(f"kind of fault in {spec!r}:", kind, KINDS)
    given: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, text = item.partition("=")
        one_of(f"key in {spec!r}:", key.strip(), KEYS[kind])
        convert: dict[str, Callable[[str], Any]] = {"factor": float, "seconds": float}
        convert |= {"where": str, "bit": str, "phase": lambda phase: phase.replace("-", " ")}
        try:
            given[key.strip()] = convert.get(key.strip(), int)(text.strip())
        except ValueError:
            raise ValueError(f"bad value for {key.strip()} in {spec!r}: {text!r} is not a number") from None
    needed = [key for key in ("step", "phase") if key in KEYS[kind] and key not in given]
    if needed:
        raise ValueError(f"{spec!r} needs {' and '.join(needed)}; keys of {kind}: {', '.join(KEYS[kind])}")
    return Fault(kind, **given)
