"""Command line: `python -m mini_resdecay list | show NAME | run NAME … | report`."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from itertools import groupby

import torch
from accelerate import PartialState

from . import experiments, require, results
from .experiments import EXPERIMENTS, TIERS, made_with

# What `report` prints of a study: of nets with a diagnosis, and of others by name.
DIAGNOSED = ("init.rebound.cka", "trained.rebound.cka", "trained.accuracy")
FEATURES = ("knn_last", "knn_best", "probe_last", "probe_best", "rank_entropy.-1", "loss")
SAMPLES = (
    *("fd", "precision", "recall", "density", "coverage", "knn_best", "probe_best"),
    *("rank_entropy.100.3", "held_loss", "test_loss"),
)
REPORTED = {
    study: tuple(f"trained.{metric}" for metric in metrics)
    for metrics, studies in ((FEATURES, ("mae", "decay")), (SAMPLES, ("diffusion", "diffusion64")))
    for study in studies
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a mistake in it is one line on stderr and exit status 2."""
    options = _parser().parse_args(arguments)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the same numbers everywhere, and two runs side by side
    try:
        options.command(options)
        sys.stdout.flush()  # here, where a closed pipe is caught
    except BrokenPipeError:  # as in `list | head`; what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(
            f"{str(stop) or 'stopped'}; --resume goes on from the last checkpoint, if any",
            file=sys.stderr,
        )
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mini_resdecay", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("list", help="all experiments and studies").set_defaults(command=_list)
    show = commands.add_parser("show", help="one experiment: source, expectation, cost, recipes")
    show.add_argument("name")
    show.set_defaults(command=_show)
    run = commands.add_parser("run", help="run one seed, or all of STUDY-study; write results")
    run.add_argument("name", help="an experiment, or STUDY-study for all that --out lacks")
    run.add_argument("--tier", default="cpu", help=f"{', '.join(TIERS)} (default: cpu)")
    run.add_argument("--seed", type=int, help="of one run (default: 0)")
    run.add_argument("--data", help="folder of image sets (default: MINI_RESDECAY_DATA)")
    run.add_argument("--out", default="runs", help="folder of results (default: runs)")
    run.add_argument("--resume", action="store_true", help="skip what is done, go on if stopped")
    run.add_argument("--part", help="of a study: 1/2 and 2/2 run side by side")
    run.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change fields"
    )
    run.set_defaults(command=_run)
    report = commands.add_parser("report", help="recorded results, mean and spread over seeds")
    report.add_argument("--out", help="folder of results (default: those of the book)")
    report.set_defaults(command=_report)
    return parser


def _list(options: argparse.Namespace) -> None:
    for name, one in EXPERIMENTS.items():
        print(f"{name:42} {len(one.seeds)} seeds of {one.minutes:4g} min  {one.source}")
    for study in dict.fromkeys(experiment.study for experiment in EXPERIMENTS.values()):
        mine = [experiment for experiment in EXPERIMENTS.values() if experiment.study == study]
        hours = sum(len(one.seeds) * one.minutes for one in mine) / 60
        print(f"{study + '-study':42} {len(mine)} arms, {hours:.1f} hours")


def _show(options: argparse.Namespace) -> None:
    require(
        "name",
        options.name,
        not options.name.endswith("-study"),
        "be one arm, not a study; `list` names the arms of each",
    )
    experiment = experiments.get(options.name)
    print(f"{experiment.name}\n  source:  {experiment.source}\n  expects: {experiment.expects}")
    print(
        f"  cost:    {experiment.minutes:g} minutes, {experiment.memory_gib:g} GiB "
        "(tier t4, two CPU cores, nothing else running)"
    )
    print(f"  seeds:   {', '.join(map(str, experiment.seeds))}")
    for tier, recipe in experiment.tiers.items():
        print(f"  {tier + ':':8} {json.dumps(asdict(recipe))}")


def _run(options: argparse.Namespace) -> None:
    PartialState(cpu=not torch.accelerator.is_available())  # said outright, as in `make_state`
    study = options.name.removesuffix("-study")
    if study == options.name:
        require("--part", options.part, options.part is None, "be left out: it is for STUDY-study")
        runs = [(experiments.get(study), options.seed or 0)]
    else:
        require("--seed", options.seed, options.seed is None, "be left out: a study has its own")
        runs = experiments.queue(
            study, options.out, *_part(options.part), options.tier, options.set
        )
    if not runs:
        PartialState().print(f"nothing left: all runs of {study} are in {options.out}")
    for place, (experiment, seed) in enumerate(runs, 1):
        if study != options.name:
            PartialState().print(
                f"[{place} of {len(runs)}] {experiment.name}, seed {seed}", flush=True
            )
        path = experiments.run(
            experiment.name,
            tier=options.tier,
            seed=seed,
            data=options.data,
            out=options.out,
            resume=options.resume,
            changes=options.set,
        )
        PartialState().print(f"recorded in {path}", flush=True)  # one process speaks for all


def _part(text: str | None) -> tuple[int, int]:
    part, _, parts = (text or "1/1").partition("/")
    fits = part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)
    require("part", text, fits, "be like 1/2, its first number at most its second")
    return int(part), int(parts)


def _report(options: argparse.Namespace) -> None:
    recorded = results.recorded(options.out)
    require("--out", options.out, bool(recorded), "be a folder of runs, STUDY/ARM-sSEED.json in it")
    print(f"{'study':10} {'arm':32} {'metric':26} {'mean':>8} {'sd':>8}  n  made with")
    here = [one for one in EXPERIMENTS.values() if (one.study, one.arm) in recorded]
    for one in here:
        runs = results.load_runs(one.study, one.arm, options.out)
        for how, alike in groupby(sorted(runs, key=made_with), made_with):
            _print_means(list(alike), how)
    print(f"{len(here)} of {len(EXPERIMENTS)} arms are recorded here; `list` names all")


def _print_means(runs: list[results.Run], how: str) -> None:
    for metric in REPORTED.get(runs[0].study, DIAGNOSED):
        try:
            mean, sd, n = results.summary(runs, metric)
            told = f"{mean:8.4f} " + (f"{sd:8.4f}" if n > 1 else f"{'–':>8}")
        except ValueError:  # CKA is not defined where a layer maps all inputs to one point
            told = f"{'undefined':17}"
        print(f"{runs[0].study:10} {runs[0].arm:32} {metric:26} {told}  {len(runs)}  {how}")


if __name__ == "__main__":
    sys.exit(main())
