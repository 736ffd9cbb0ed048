"""The command line: ``dist-stability demo | experiment NAME | bench NAME | diagnose NAME | report RUN | doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_stability.diagnostics.command import cli as diagnose
from dist_stability.experiments.paper.protocol import ARMS, FAULTS
from dist_stability.report.events import write_json

BENCH_PARTS = ("open-loop", "noise", "bloom", "closed-loop")
ENGINE_PARTS = ("snapshot", "step", "restore", "edge", "scale")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    Args:
        arguments: The words after the program's name; default ``sys.argv``.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        print("stopped; what is finished stays where it is", file=sys.stderr)
        return 130
    return status


def _demo(options: argparse.Namespace) -> int:
    from dist_stability.experiments.arms import ArmFailed
    from dist_stability.experiments.demo import demo
    from dist_stability.report.extras import MissingExtra, import_extra

    try:
        import_extra("matplotlib.figure", "the demo's figure")  # known before three minutes of training, not after
        return demo(options.out)
    except (ArmFailed, MissingExtra) as error:
        return _failed(error)


def _bench(options: argparse.Namespace) -> int:
    from dist_stability.bench.detection.command import bench
    from dist_stability.report.extras import MissingExtra, import_extra

    try:
        for module, purpose in (("sklearn.datasets", "the benchmark's digits"), ("matplotlib.figure", "its figure")):
            import_extra(module, purpose)
        bench(
            options.out,
            seeds=options.seeds,
            quick=options.quick,
            parts=options.parts,
            workers=options.workers,
            arms=options.arms,
            tasks=options.tasks,
        )
    except (MissingExtra, ValueError) as error:
        return _failed(error)
    for name in ("report.html", "tables.md", "summary.json"):
        print(options.out / name)
    return 0


def _bench_engine(options: argparse.Namespace) -> int:
    from dist_stability.bench.engine.command import bench, bench_gpu
    from dist_stability.bench.engine.ranks import RanksFailed
    from dist_stability.report.extras import MissingExtra, import_extra

    try:
        import_extra("matplotlib.figure", "the benchmark's figure")
        if options.name == "gpu":
            bench_gpu(options.out, quick=options.quick, ranks=options.ranks)
            names = [f"{part}/report.html" for part in ENGINE_PARTS] + ["summary.json"]
        else:
            settings = {key: getattr(options, key) for key in ("device", "ranks", "link") if hasattr(options, key)}
            bench(options.name, options.out, quick=options.quick, **settings)
            names = ["report.html", "tables.md", "summary.json"]
    except (MissingExtra, ValueError, RanksFailed) as error:
        return _failed(error)
    for name in names:
        print(options.out / name)
    return 0


def _spectral(options: argparse.Namespace) -> int:
    from dist_stability.experiments.spectral.command import experiment_kss, experiment_rksp

    out = options.out or Path("out") / f"experiment-{options.name}"
    try:
        given = [
            name for name in ("seeds", "arms", "tasks", "data", "width", "layers") if getattr(options, name) is not None
        ]
        if options.name == "kss" and options.parts is not None:
            given.append("parts")
        if given:
            raise ValueError(f"--{given[0]}: does not go with {options.name}, whose grid is fixed in code")
        if options.name == "kss":
            return experiment_kss(out, workers=options.workers, quick=options.quick)
        return experiment_rksp(out, parts=options.parts, workers=options.workers, quick=options.quick)
    except ValueError as error:
        return _failed(error)


def _restrained(options: argparse.Namespace) -> int:
    from dist_stability.experiments.restrained.command import experiment
    from dist_stability.report.extras import MissingExtra, import_extra

    try:
        given = [name for name in ("seeds", "arms", "tasks") if getattr(options, name) is not None]
        if given:
            raise ValueError(f"--{given[0]}: does not go with restrained, whose settings are fixed in code")
        for module, purpose in (("sklearn.datasets", "the digits"), ("matplotlib.figure", "the figures")):
            import_extra(module, purpose)
        return experiment(
            options.out or Path("out") / "experiment-restrained",
            parts=options.parts,
            workers=options.workers,
            quick=options.quick,
            data=options.data,
        )
    except (MissingExtra, ValueError) as error:
        return _failed(error)


def _experiment(options: argparse.Namespace) -> int:
    if options.name in ("rksp", "kss"):
        return _spectral(options)
    if options.name == "restrained":
        return _restrained(options)
    if options.parts is not None:
        return _failed(ValueError(f"--parts: goes with rksp and restrained, not with {options.name}"))
    from dist_stability.experiments.paper.command import experiment
    from dist_stability.report.extras import MissingExtra, import_extra

    try:
        import_extra("matplotlib.figure", "the experiment's figures")  # known before hours of training, not after
        return experiment(
            options.name,
            options.out or Path("out") / f"experiment-{options.name}",
            seeds=options.seeds,
            arms=options.arms,
            faults=options.faults,
            parallels=options.parallel,
            tasks=options.tasks,
            workers=options.workers,
            device=options.device,
            data=options.data,
            probe_size=options.probe_size,
            width=options.width,
            layers=options.layers,
            quick=options.quick,
        )
    except (MissingExtra, ValueError) as error:
        return _failed(error)


def _report(options: argparse.Namespace) -> int:
    from dist_stability.report.build import report
    from dist_stability.report.extras import MissingExtra
    from dist_stability.report.runs import NoRun

    out = options.out or options.run_folder / "report"
    try:
        report(options.run_folder, out)
    except (NoRun, MissingExtra, ValueError) as error:
        return _failed(error)
    print(out / "report.html")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from dist_stability.report.doctor import examine, show

    found = examine()
    print(show(found))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "summary.json", found)
    return 0 if found["groups"]["gloo_two_processes"] else 1


def _failed(error: Exception) -> int:
    print(f"dist-stability: error: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-stability", description="Training that undoes its own bad updates: demo, reports, machine check."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="a fault, refused: four short training runs and a report, about three minutes"
    )
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s")
    demo.set_defaults(run=_demo)

    experiment = commands.add_parser(
        "experiment", help="the papers' experiments: arms against faults, and prediction of divergence"
    )
    experiment.add_argument(
        "name",
        choices=["text", "vision", "rksp", "kss", "restrained"],
        metavar="NAME",
        help="text, vision, rksp, kss or restrained",
    )
    experiment.add_argument("--out", type=Path, metavar="DIR", help="default: out/experiment-NAME")
    experiment.add_argument(
        "--seeds", type=int, metavar="N", help="for reporting, from 0; default: 20 for text, 5 for vision"
    )
    experiment.add_argument("--arms", nargs="+", metavar="ARM", help=f"default: all of {' '.join(ARMS)}")
    experiment.add_argument(
        "--faults",
        nargs="+",
        default=FAULTS[:1],
        metavar="FAULT",
        help=f"some of {' '.join(FAULTS)}, or all; default: {FAULTS[0]}, the paper's",
    )
    experiment.add_argument(
        "--parallel",
        nargs="+",
        default=["single"],
        metavar="MODE",
        help="single, ddp or fsdp2, on two processes; default: single",
    )
    experiment.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="text: phrase, text; vision: distorted-digits, digits; default: all"
    )
    experiment.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes; default: cores"
    )
    experiment.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    experiment.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of CIFAR-10 (restrained: adds R12), for vision; without it: digits",
    )
    experiment.add_argument(
        "--probe-size",
        type=int,
        metavar="N",
        help="held-out examples in the probe; default: 16, vision 128",
    )
    experiment.add_argument("--width", type=int, metavar="N", help="text: of the Transformer; default: 64")
    experiment.add_argument("--layers", type=int, metavar="N", help="text: of the Transformer; default: 2")
    experiment.add_argument(
        "--parts",
        nargs="+",
        metavar="PART",
        help="rksp: grids and checks; restrained: R1 to R11, calibration; default: all",
    )
    experiment.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    experiment.set_defaults(run=_experiment)

    benches = commands.add_parser("bench", help="what the parts are worth and what they cost, measured")
    kinds = benches.add_subparsers(required=True, metavar="NAME")
    bench = kinds.add_parser("detection", help="what the rules are worth: recordings, noise, closed loop")
    bench.add_argument(
        "--out", type=Path, default=Path("out/bench-detection"), metavar="DIR", help="default: %(default)s"
    )
    bench.add_argument(
        "--seeds", type=int, default=2, metavar="N", help="for tuning, and again for reporting; default: 2"
    )
    bench.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    bench.add_argument(
        "--parts",
        nargs="+",
        default=BENCH_PARTS,
        choices=BENCH_PARTS,
        metavar="PART",
        help=f"default: all of {' '.join(BENCH_PARTS)}; the others stay as an earlier call in DIR left them",
    )
    bench.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes; default: cores"
    )
    bench.add_argument("--arms", nargs="+", metavar="RULE", help="of the closed loop; default: all, which takes hours")
    bench.add_argument("--tasks", nargs="+", metavar="TASK", help="of the closed loop; default: all")
    bench.set_defaults(run=_bench)
    _add_engine_benches(kinds)

    diagnose.add(commands)

    report = commands.add_parser("report", help="figures and one page for a run, or for a folder of runs")
    report.add_argument("run_folder", type=Path, metavar="RUN", help="what a run was given as --out")
    report.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/report")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="versions, devices, groups, limits, and what would go wrong here")
    doctor.add_argument("--out", type=Path, default=Path("out/doctor"), metavar="DIR", help="default: %(default)s")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_engine_benches(kinds: Any) -> None:
    """The benchmarks of what a guarded step costs."""
    said = {
        "snapshot": "what a copy of the state costs the host, beside other ways to take one",
        "step": "whole training steps: plain, guarded in several ways, clone + deepcopy",
        "edge": "what the monitor of the edge of stability costs, by level",
        "restore": "how long a restore and a whole rollback take, over a memcpy",
        "scale": "bytes, link time and collectives of Llama-3 at 8 to 16,384 ranks, planned without them",
        "recovery": "whole restarts: from shared memory, from a checkpoint, from the same by torch's own means",
        "gpu": "all but the last of these on a GPU, in less than ten minutes",
    }
    for name, help_text in said.items():
        bench = kinds.add_parser(name, help=help_text)
        default = Path(f"out/bench-{name}")
        bench.add_argument("--out", type=Path, default=default, metavar="DIR", help="default: %(default)s")
        bench.add_argument("--quick", action="store_true", help="as little as possible, to see that it runs")
        if name in ("snapshot", "step", "restore", "edge", "recovery"):
            bench.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
        if name in ("step", "restore", "edge", "gpu"):
            text = "with two or more, DDP and FSDP2 on as many processes, too; default: 1"
            bench.add_argument("--ranks", type=int, default=1, metavar="N", help=text)
        if name == "recovery":
            text = "with two or more, under FSDP2; default: 2"
            bench.add_argument("--ranks", type=int, default=2, metavar="N", help=text)
        if name == "scale":
            bench.add_argument("--link", type=float, metavar="GB/S", help="from device to host; default: 50, as stated")
        bench.set_defaults(run=_bench_engine, name=name)
