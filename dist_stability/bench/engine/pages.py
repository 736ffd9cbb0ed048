"""What a person reads: the same sections as Markdown tables and as one HTML page with figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_stability.bench.engine import figures
from dist_stability.bench.engine.machine import in_words
from dist_stability.bench.engine.starts import PARTS
from dist_stability.bench.engine.timing import shown
from dist_stability.report import html
from dist_stability.report.markdown import markdown
from dist_stability.report.plots import save_png, to_png


@dataclass
class Section:
    """A heading, a note, and a table or none."""

    head: str
    note: str
    columns: Sequence[str] = ()
    rows: list[list[Any]] = field(default_factory=list)


def write_pages(out: Path, summary: Mapping[str, Any]) -> None:
    """Write ``tables.md``, the figure and ``report.html`` of a benchmark."""
    name = summary["benchmark"]
    title = f"dist-stability bench {name}" + (" (quick run: no figure here means anything)" * summary["quick"])
    sections = SECTIONS[name](summary)
    where = in_words(summary["machine"])
    text = [f"# {title}\n\n{where}\n"]
    parts = []
    drawn = figures.FIGURES[name](summary, where)
    save_png(drawn, out / f"{name}.png")
    parts.append(html.figure(to_png(drawn), "Median of the rounds."))
    for section in sections:
        table = markdown(section.columns, section.rows) if section.columns else ""
        text.append("\n".join([f"## {section.head}\n", f"{section.note}\n", table]))
        parts += [html.heading(section.head), html.paragraph(section.note)]
        parts += [html.table(section.columns, section.rows)] if section.columns else []
    (out / "tables.md").write_text("\n".join(text), encoding="utf-8")
    (out / "report.html").write_text(html.page(title, where, parts), encoding="utf-8")


def _snapshot(summary: Mapping[str, Any]) -> list[Section]:
    columns = ["copy", "returns (ms)", "there (ms)", "CPU (ms)", "CPU / ours", "there / memcpy"]
    columns += ["bytes / payload", "allocations"]
    sections = []
    for name, size in summary["sizes"].items():
        rows = [
            [
                *(keeper, shown(k["returns_ms"]), shown(k["there_ms"]), shown(k["cpu_ms"])),
                *(shown(k["cpu_over_ours"]), shown(k["there_over_limit"])),
                *(f"{k['bytes_over_payload']:.3f}", k["allocations_after_warmup"]),
            ]
            for keeper, k in size["keepers"].items()
        ]
        parts = ", ".join(f"{part} {ms:.2g} ms" for part, ms in size["parts_cpu_ms"].items())
        note = (
            f"{size['bytes'] / 1e6:.4g} MB in {size['tensors']} tensors. Median (quartiles). CPU is the processor time "
            f"of all threads until the copy is there. Parts of ours, each alone (CPU): {parts}."
        )
        sections.append(Section(f"A snapshot of {name}", note + _missing(size), columns, rows))
    return sections


def _restore(summary: Mapping[str, Any]) -> list[Section]:
    sections = []
    for name, size in summary["sizes"].items():
        rows = [[keeper, shown(k["ms"]), shown(k["over_limit"])] for keeper, k in size["keepers"].items()]
        note = f"{size['bytes'] / 1e6:.4g} MB in {size['tensors']} tensors; 'check' compares a slot with its digests."
        sections.append(
            Section(f"Restoring {name}", note + _missing(size), ["from", "ms", "over memcpy of as many bytes"], rows)
        )
    columns = ["mode", "ranks", "MB", "rollback (ms)", "memcpy (ms)", "a vote (ms)", "over memcpy", "less two votes"]
    rows = [
        [
            *(mode, r["ranks"], f"{r['bytes'] / 1e6:.4g}", shown(r["rollback_ms"]), shown(r["limit_ms"])),
            *(f"{r['vote_ms']:.3g}", shown(r["over_limit"]), shown(r["over_limit_less_votes"])),
        ]
        for mode, r in summary["rollback"].items()
    ]
    note = "In a training run: check of the slot, vote, restore, digests of what stands now, vote."
    return [*sections, Section("A whole rollback", note, columns, rows)]


def _step(summary: Mapping[str, Any]) -> list[Section]:
    sections = []
    columns = [
        "loop",
        "ms per step",
        "over plain",
        "CPU over plain",
        "collectives",
        "of ours",
        "their bytes",
        "host syncs",
    ]
    columns += ["probe (ms)", "vote (ms)", "copy (ms)"]
    for mode, found in summary["modes"].items():
        rows = [
            [
                *(name, shown(loop["ms"]), shown(loop["over_plain"]), shown(loop["cpu_over_plain"])),
                *(f"{loop['collectives_per_step']:g}", f"{loop['own_collectives_per_step']:g}", loop["own_bytes"]),
                f"{loop['host_syncs_per_step']:g}",
                *(f"{1e3 * loop['seconds'][part]:.3g}" if part in loop["seconds"] else "" for part in _PARTS),
            ]
            for name, loop in found["loops"].items()
        ]
        over = found["reference_over_guarded"]
        work = ", ".join(f"{name} {value}" for name, value in found["work"].items())
        note = (
            f"Ranks: {found['ranks']}; transformer: {work}. Collectives and host syncs per step are counted; "
            f"host syncs are those beyond the plain loop's. Parts: host time of a judged step. What clone + deepcopy "
            f"adds to the plain step is {'(unknown)' if over is None else f'{over:.2g}'} times what guarded adds; its "
            f"copies hold the training thread {found['reference_copy_over_guarded']:.2g} times as long."
        )
        sections.append(Section(f"Steps, {mode}", note, columns, rows))
        auto = found["auto"]
        said = "; then: ".join(auto["notes"]) or "no round was finished"
        over = shown(auto["over_plain"]) or "unknown"
        note = f"{said}. Time over plain after the first choice, rounds included: {over}."
        sections.append(Section(f'every="auto", {mode}', note))
    return sections


def _edge(summary: Mapping[str, Any]) -> list[Section]:
    rows = []
    for mode, found in summary["modes"].items():
        for level, ratio in found["levels"].items():
            rows.append([mode, level, found["measured"][level], shown(ratio)])
        rows.append([mode, "together", "", shown(found["monitor_over_plain"])])
    last = list(summary["modes"].values())[-1]
    note = (
        "Over a whole plain step (forward, backward, optimizer), in processor time, on CUDA in wall time; "
        f"{last['steps']} steps. The first margin comes once and takes {last['first_margin_products']} products: "
        f"{last['first_margin_steps']:.3g} plain steps. The state machine is not in it: microseconds."
    )
    columns = ["mode", "part", "looks", "over plain"]
    return [Section("The monitor of the edge of stability, by level", note, columns, rows)]


_PARTS = ("probe", "vote", "copy")


def _scale(summary: Mapping[str, Any]) -> list[Section]:
    link = summary["link"]
    columns = ["model", "mode", "ranks", "shards", "replicas", "shapes", "GB per rank", "GB split", "link (ms)"]
    columns += ["link split (ms)", "collectives", "vote (bytes)", "gathered at start (MB)"]
    rows = [
        [
            *(row[key] for key in ("model", "mode", "ranks", "shards", "replicas", "shapes")),
            *(f"{row[key] / 1e9:.3g}" for key in ("bytes_per_rank", "bytes_per_rank_split")),
            *(f"{row[key]:.3g}" for key in ("link_ms", "link_ms_split")),
            *(f"{row['collectives_per_step']:g}", row["vote_bytes"], f"{row['start_up_gather_bytes'] / 1e6:.3g}"),
        ]
        for row in summary["rows"]
    ]
    note = (
        f"Link: {link['gb_per_s']:g} GB/s ({'stated' if link['stated'] else 'measured or given'}). 'Split': each "
        "replica keeps its part of what all hold. Collectives of a judged step without guards: constant in the number "
        "of ranks. The vote's bytes do not depend on the number of ranks but, with replicas, on the number of shards: "
        "64 bytes for each set of replicas. Gathered at start: which ranks hold the same, said by the first of each."
    )
    return [Section("Llama-3 at scale", note, columns, rows)]


def _recovery(summary: Mapping[str, Any]) -> list[Section]:
    columns = ["from", *(f"{part} (s)" for part in (*PARTS, "until state"))]
    ratios = [
        "our share",
        "over memcpy",
        "over memcpy into new memory",
        "over shared memory",
        "restart over shared memory",
    ]
    sections = []
    for name, size in summary["sizes"].items():
        rows = [
            [way, *(shown(each[part], 2) for part in (*PARTS, "until state"))] for way, each in size["ways"].items()
        ]
        note = (
            f"Ranks: {summary['ranks']}; {size['bytes'] / 1e6:.4g} MB on each. Median (quartiles) of whole starts, the "
            "slower rank of each part; files put out of the page cache. 'Until state': all but the first step."
        )
        sections.append(Section(f"Restarts, {name}", note, columns, rows))
        rows = [[way, *(shown(each[key], 2) for key in ratios)] for way, each in size["ways"].items()]
        note = (
            "Our share: of the time until the state is there, what is controller and state. Over memcpy: the state's "
            "time, over a copy of its bytes in the same process, into memory in use and into memory nobody has touched."
        )
        sections.append(Section(f"Ratios, {name}", note, ["from", *ratios], rows))
    return sections


def _missing(size: Mapping[str, Any]) -> str:
    return "".join(f" {name} is missing: {reason}." for name, reason in size["missing"].items())


SECTIONS: dict[str, Callable[[Mapping[str, Any]], list[Section]]] = {
    "snapshot": _snapshot,
    "restore": _restore,
    "step": _step,
    "edge": _edge,
    "scale": _scale,
    "recovery": _recovery,
}
