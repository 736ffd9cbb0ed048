"""What a spectral profile holds: plain numbers, for people, for JSON and for comparison between ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_stability.diagnostics.spectrum import Fit, Masses

DEGENERATE_BELOW = 0.02


class RkspWarning(UserWarning):
    """A profile was made, but its numbers say less than they seem to."""


@dataclass(frozen=True, slots=True)
class BlockProfile:
    """One block. All numbers are the same on every rank; those of a block with a ``problem`` are NaN.

    Attributes:
        name: Its name in the model without wrappers; "name#1" for the second call of a block in one forward.
        width: Length of a hidden state, d.
        tokens: Tokens that counted, over all ranks, N.
        dropped: Tokens left out because the input or output was not finite.
        rank: Number of modes, at most d.
        truncated: Fitted in a subspace: not comparable with a full fit.
        masses: Shares of eigenvalues near the unit circle, above, below, between.
        filtered: The same over the modes with a residual of at most tau.
        kept: Share of modes that the filter keeps.
        radius: Largest modulus of an eigenvalue, rho.
        condition: Condition number of the eigenvectors, kappa.
        fit_ratio: What the linear map leaves of the whitened update, eta.
        kreiss: Kreiss constant; infinite when radius > 1.
        transient: Kreiss constant of A / max(1, radius).
        whitened_update: ||Yw - Xw|| / ||Xw||.
        relative_update: ||y - x|| / ||x||, root mean squares over tokens, not centred.
        gain: ||y|| / ||x||, likewise.
        degenerate: The block is the identity for practical purposes (whitened update under 0.02).
        problem: Why there is no spectrum, or "".
    """

    name: str
    width: int
    tokens: int
    dropped: int
    rank: int
    truncated: bool
    masses: Masses
    filtered: Masses
    kept: float
    radius: float
    condition: float
    fit_ratio: float
    kreiss: float
    transient: float
    whitened_update: float
    relative_update: float
    gain: float
    degenerate: bool
    problem: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one quantity over blocks; ``std`` is that of the population."""

    mean: float
    max: float
    min: float
    std: float


@dataclass(frozen=True, slots=True)
class Baselines:
    """What predicts about as well for less.

    Attributes:
        relative_update: Mean over blocks of ||y - x|| / ||x||; small goes with a high score.
        gradient_norm: Of ``loss_fn`` on the batch, global; None without a ``loss_fn``.
        has_norm: Whether any profiled block contains a normalization layer.
    """

    relative_update: float
    gradient_norm: float | None
    has_norm: bool


@dataclass(frozen=True, slots=True)
class Profile:
    """Of a model. Plain numbers: ``to_dict`` gives what JSON holds, but for NaN and infinities.

    Attributes:
        score: Mean share of near-unit eigenvalues over blocks; higher is riskier by the paper. Not a probability. None
            where it would say nothing: half of the blocks or more are degenerate, or none has a spectrum.
        degenerate: At least half of the blocks are the identity for practical purposes.
        truncated: Some block was fitted in a subspace.
        blocks: In the order of the model.
        aggregates: Summaries over blocks with a spectrum, of near_unit, unstable, damped, filtered_near_unit, kept,
            radius, condition, fit_ratio, kreiss, transient, relative_update and gain.
        baselines: To be compared with the score.
        skipped: Candidates that are no blocks, and why.
        fit: How blocks were fitted, None for the default.
        tau: Of the residual filter.
        ranks: Number of ranks whose tokens went in.
        warnings: What limits the numbers.
        eigenvalues: By block, real and imaginary parts; empty if they were not asked for.
    """

    score: float | None
    degenerate: bool
    truncated: bool
    blocks: tuple[BlockProfile, ...]
    aggregates: Mapping[str, Summary]
    baselines: Baselines
    skipped: Mapping[str, str]
    fit: Fit | None
    tau: float
    ranks: int
    warnings: tuple[str, ...]
    eigenvalues: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it as dictionaries, lists and numbers."""
        return asdict(self)

    def table(self) -> str:
        """For people: a line per block, the means, the baselines and the warnings."""
        head = f"{'block':<24}{'rank':>10}{'near 1':>8}{'above':>8}{'below':>8}{'rho':>9}{'kappa':>10}{'eta':>8}"
        lines = [head + f"{'kept':>7}{'update':>9}{'gain':>8}"]
        for each in self.blocks:
            rank = f"{each.rank}/{each.width}{'*' if each.truncated else ''}"
            masses = "".join(f"{part:8.3f}" for part in (each.masses.near_unit, each.masses.unstable))
            note = f"  {each.problem}" if each.problem else "  degenerate" if each.degenerate else ""
            lines.append(
                f"{each.name[-23:]:<24}{rank:>10}{masses}{each.masses.damped:8.3f}{each.radius:9.3f}"
                f"{each.condition:10.3g}{each.fit_ratio:8.3f}{each.kept:7.2f}{each.relative_update:9.4f}"
                f"{each.gain:8.3f}{note}"
            )
        score = "not informative" if self.score is None else f"{self.score:.3f}"
        gradient = self.baselines.gradient_norm
        lines += [
            f"score (mean share near 1, not a probability): {score}",
            f"baselines: relative update {self.baselines.relative_update:.4f}, gradient norm "
            f"{'not measured' if gradient is None else f'{gradient:.4g}'}, normalization layers "
            f"{'yes' if self.baselines.has_norm else 'no'}",
        ]
        return "\n".join([*lines, *(f"note: {each}" for each in self.warnings)])


def assemble(
    blocks: list[BlockProfile],
    skipped: Mapping[str, str],
    norm: float | None,
    has_norm: bool,
    fit: Fit | None,
    tau: float,
    ranks: int,
) -> Profile:
    """The profile of a model from those of its blocks; the other arguments are its attributes."""
    good = [each for each in blocks if not each.problem]
    quantities: dict[str, Callable[[BlockProfile], float]] = {
        "near_unit": lambda each: each.masses.near_unit,
        "unstable": lambda each: each.masses.unstable,
        "damped": lambda each: each.masses.damped,
        "filtered_near_unit": lambda each: each.filtered.near_unit,
        **{
            name: lambda each, name=name: float(getattr(each, name))  # type: ignore[misc]
            for name in ("kept", "radius", "condition", "fit_ratio", "kreiss", "transient", "relative_update", "gain")
        },
    }
    aggregates = {name: summary([read(each) for each in good]) for name, read in quantities.items()}
    degenerate = bool(good) and 2 * sum(each.degenerate for each in good) >= len(good)
    return Profile(
        score=aggregates["near_unit"].mean if good and not degenerate else None,
        degenerate=degenerate,
        truncated=any(each.truncated for each in blocks),
        blocks=tuple(blocks),
        aggregates=aggregates,
        baselines=Baselines(aggregates["relative_update"].mean, norm, has_norm),
        skipped=skipped,
        fit=fit,
        tau=tau,
        ranks=ranks,
        warnings=tuple(limits(blocks, degenerate)),
    )


def summary(values: list[float]) -> Summary:
    """Over the values that are numbers (a filter that keeps no mode of a block leaves no share); NaN without any."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return Summary(*[math.nan] * 4)
    mean = math.fsum(values) / len(values) if math.isfinite(max(values)) else math.inf
    spread = statistics.pstdev(values, mean) if math.isfinite(mean) else math.nan
    return Summary(mean, max(values), min(values), spread)


def limits(blocks: list[BlockProfile], degenerate: bool) -> list[str]:
    """Each kind once, with the blocks it is about."""

    def about(chosen: list[BlockProfile]) -> str:
        return f"{', '.join(each.name for each in chosen[:4])}{', ...' if len(chosen) > 4 else ''}"

    said = []
    if few := [each for each in blocks if each.tokens < 4 * each.width and not each.truncated]:
        said.append(
            f"too few tokens: {few[0].tokens} for width {few[0].width} ({about(few)}); use at least 8 for each "
            "dimension, fewer spread the eigenvalues"
        )
    # One direction less is what a LayerNorm before the block leaves.
    if lean := [each for each in blocks if 0 < each.rank < each.width - 1 and not each.truncated]:
        said.append(
            f"the input varies in {lean[0].rank} of {lean[0].width} directions only ({about(lean)}): too few different "
            "tokens, or a repeated phrase; masses are over those directions"
        )
    if lost := [each for each in blocks if each.dropped]:
        said.append(f"{lost[0].dropped} tokens were not finite and are left out ({about(lost)})")
    if bad := [each for each in blocks if each.problem]:
        said.append(f"no spectrum for {about(bad)}: {bad[0].problem}")
    if truncated := [each for each in blocks if each.truncated]:
        said.append(f"truncated to a subspace ({about(truncated)}): not comparable with full fits")
    if degenerate:
        said.append(
            "blocks start as the identity (Fixup, ReZero, small output weights): not informative, no score; profile "
            "again after some training"
        )
    return said
