"""One figure for each benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_stability.report.plots import COLORS, OTHERS, canvas


def bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    subtitle: str,
    axis: str,
    scale: str = "log",
    line: float | None = None,
) -> Any:
    """Groups of bars, one colour for each name.

    Args:
        groups: By group, by name: positive numbers.
        title: First line.
        subtitle: Second line, smaller.
        axis: What the numbers are.
        scale: Of the axis, "log" or "linear".
        line: Where to draw a line across.

    Returns:
        A matplotlib figure.
    """
    figure, axes = canvas(title, subtitle)
    axes.set_position((0.08, 0.125, 0.68, 0.7))
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        places = [index for index, group in enumerate(groups.values()) if name in group]
        heights = [group[name] for group in groups.values() if name in group]
        axes.bar(
            [place + (number - (len(names) - 1) / 2) * width for place in places],
            heights,
            0.9 * width,
            color=COLORS["guarded"] if number == 0 else OTHERS[1:][(number - 1) % (len(OTHERS) - 1)],
            hatch="//" if number >= len(OTHERS) else None,
            label=name,
            zorder=2,
        )
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_yscale(scale)
    axes.set_ylabel(axis)
    if line is not None:
        axes.axhline(line, color="black", linewidth=1, zorder=3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8.5)
    return figure


def _keepers(summary: Mapping[str, Any], metric: str) -> dict[str, dict[str, float]]:
    return {
        size: {name: keeper[metric]["median"] for name, keeper in each["keepers"].items() if metric in keeper}
        for size, each in summary["sizes"].items()
    }


def _snapshot(summary: Mapping[str, Any], where: str) -> Any:
    return bars(
        _keepers(summary, "cpu_ms"),
        title="A snapshot: processor time until the copy is there",
        subtitle=where,
        axis="ms",
    )


def _restore(summary: Mapping[str, Any], where: str) -> Any:
    return bars(
        _keepers(summary, "over_limit"),
        title="Restoring, over a memcpy of as many bytes",
        subtitle=where,
        axis="time / memcpy",
        line=1.0,
    )


def _step(summary: Mapping[str, Any], where: str) -> Any:
    groups = {
        mode: {name: loop["over_plain"]["median"] for name, loop in found["loops"].items() if name != "plain"}
        for mode, found in summary["modes"].items()
    }
    return bars(
        groups, title="A training step, over a plain one", subtitle=where, axis="time / plain", scale="linear", line=1.0
    )


def _scale(summary: Mapping[str, Any], where: str) -> Any:
    rows: Sequence[Mapping[str, Any]] = summary["rows"]
    figure, axes = canvas("Bytes of a snapshot per rank", "Llama-3, float32 parameters and AdamW; nothing split")
    axes.set_position((0.08, 0.125, 0.68, 0.7))
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        for mode, style in (("FSDP", "-"), ("HSDP", "--"), ("DDP", ":")):
            mine = [row for row in rows if row["model"] == model and row["mode"] == mode]
            label = f"{model} {mode}" + ("" if mode == "FSDP" else ", split: as FSDP")
            ranks = [row["ranks"] for row in mine]
            axes.plot(ranks, [row["bytes_per_rank"] / 1e9 for row in mine], style, color=OTHERS[number], label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row["ranks"] for row in rows})
    axes.set_xticks(ticks, [f"{ranks:,}" for ranks in ticks])
    axes.set_xlabel("ranks")
    axes.set_ylabel("GB per rank")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8.5)
    return figure


def _edge(summary: Mapping[str, Any], where: str) -> Any:
    groups = {
        mode: {level: 100.0 * ratio["median"] for level, ratio in found["levels"].items()}
        for mode, found in summary["modes"].items()
    }
    return bars(
        groups, title="The monitor of the edge of stability", subtitle=where, axis="% of a plain step", scale="linear"
    )


def _recovery(summary: Mapping[str, Any], where: str) -> Any:
    groups = {
        size: {way: each["over memcpy"]["median"] for way, each in found["ways"].items()}
        for size, found in summary["sizes"].items()
    }
    return bars(
        groups,
        title="A restart has its state back, over a memcpy of as many bytes",
        subtitle=where,
        axis="time / memcpy",
    )


FIGURES: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
    "snapshot": _snapshot,
    "restore": _restore,
    "step": _step,
    "edge": _edge,
    "scale": _scale,
    "recovery": _recovery,
}
