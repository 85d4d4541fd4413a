"""Tables of cifar10.py: each row a way to train, over several seeds, at the same number of updates or the same cost.

    python examples/experiments/study.py methods --data DIR --seeds 3 --json methods.json --plot methods.png

Runs are kept under `--out`, so an interrupted study goes on where it was. What follows `--` is passed on to
every run, such as `-- --images 2000 --passes 4`.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import cifar10
import plots
from records import write

SAME = "--ascent-cost 0"  # as many updates for every method
SMALL = (
    f"{SAME} --model cnn-16 --images 5000 --passes 50 --lr 0.2 --looks 10 --held-out 500 --test-images 1000 "
    "--test-batch 1000 --attacks pgd-50 autoattack"
)
JUDGED = (
    f"{SAME} --channels-last --looks 5 --held-out 1000 --test-batch 1000 --hard-images 1000 --weights last best "
    "--attacks pgd-20-1 pgd-50 autoattack"
)
FREE = "--method free --replays"
TURNS = f"{FREE} 8 --window 8"
ONE = "--method n-fgsm"
LATE = f"{FREE} 1 --start zero --later 0.3 ascents=1 noise=2"
EPS_8 = "--test-eps 8/255"
BOTH = "--label-smoothing 0.1 --ema 0.999"
QUICK = "--attacks pgd-50"
TUNE = f"--passes 5 --lr 0.05 --looks 5 {QUICK}"
STUDIES: dict[str, dict[str, str]] = {
    "methods": {
        "natural": "--method natural",
        **{f"Free, m={m}": f"{FREE} {m}" for m in (2, 4, 8, 10)},
        "PGD-7": "--method pgd",
        "FGSM-RS": "--method fgsm-rs",
    },
    "finetune": {  # weights of the natural run of the same seed, made robust in a tenth of its passes
        "natural": "--method natural",
        "natural, then Free m=4": f"{FREE} 4 {TUNE} --init {{natural}}",
        "natural, then PGD-7": f"--method pgd {TUNE} --init {{natural}}",
        "Free m=4 alone, as long": f"{FREE} 4 {TUNE}",
    },
    "short": {
        "natural": f"--method natural {QUICK}",
        **{f"Free, m={m}": f"{FREE} {m} {QUICK}" for m in (4, 8)},
        "PGD-7": f"--method pgd {QUICK}",
    },
    "details": {
        "Free, m=8": f"{FREE} 8",
        "delta zero at each minibatch": f"{FREE} 8 --start zero {QUICK}",
        "delta uniform at each minibatch": f"{FREE} 8 --start uniform {QUICK}",
        "clamp inside the graph": f"--method free-public --replays 8 {QUICK}",
    },
    "recipe": {
        "Free, m=8": f"{FREE} 8",
        "with averaged weights": f"{FREE} 8 --ema 0.999 {QUICK}",
        "with SiLU": f"{FREE} 8 --activation silu {QUICK}",
        "with label smoothing 0.1": f"{FREE} 8 --label-smoothing 0.1 {QUICK}",
        "with all three": f"{FREE} 8 --ema 0.999 --activation silu --label-smoothing 0.1 {QUICK}",
    },
    "window": {  # equal passes, and where it says so equal cost
        "natural": "--method natural",
        **{f"Free, m=8, W={w}": f"{FREE} 8 --window {w}" for w in (1, 4, 8, 16)},
        **{f"Free, m={m}, W={w}": f"{FREE} {m} --window {w}" for m in (4, 16) for w in (1, 8)},
        "FGSM-RS": "--method fgsm-rs",
        "FGSM-RS, half the passes": "--method fgsm-rs --passes 15",
        "N-FGSM": "--method n-fgsm",
        "N-FGSM, half the passes": "--method n-fgsm --passes 15",
        "PGD-7": "--method pgd",
        "PGD-7, a sixth of the passes": "--method pgd --passes 5",
    },
    "extras": {  # what costs nothing beside a window
        "Free, m=8, W=8": TURNS,
        "with label smoothing 0.1": f"{TURNS} --label-smoothing 0.1",
        "with averaged weights": f"{TURNS} --ema 0.999",
        "with both": f"{TURNS} {BOTH}",
        "with a step of 0.75 eps": f"{TURNS} --step-size 6/255",
        "with a step of 0.5 eps": f"{TURNS} --step-size 4/255",
        "with a step of 1.5 eps": f"{TURNS} --step-size 12/255",
        "with a step of 2 eps": f"{TURNS} --step-size 16/255",
        "with batch norm's momentum over m": f"{TURNS} --norm-momentum 0.0125",
        **{f"trained with eps {e}/255": f"{TURNS} --eps {e}/255 {EPS_8}" for e in (9, 10)},
        "N-FGSM, half the passes, eps 6/255": f"--method n-fgsm --passes 15 --eps 6/255 {EPS_8}",
    },
    "frontier": {
        "natural": "--method natural",
        "Free, m=8, W=1": f"{FREE} 8",
        "Free, m=8, W=8": TURNS,
        "Free, m=4, W=1": f"{FREE} 4",
        "Free, m=4, W=8, step 2 eps": f"{FREE} 4 --window 8 --step-size 16/255",
        "FGSM-RS": "--method fgsm-rs",
        "N-FGSM": "--method n-fgsm",
        "natural for 0.3 of the cost, then N-FGSM": LATE,
        "one ascent, m=2, W=8, step 2 eps": f"{FREE} 2 --ascents 1 --window 8 --step-size 16/255",
        "N-FGSM, two replays, W=8": f"{ONE} --replays 2 --window 8",
        "PGD-2": "--method pgd --ascents 2 --step-size 4/255",
        "PGD-7": "--method pgd",
    },
    "sixteen": {  # does it collapse?
        "one ascent, m=1, step 2 eps": f"{FREE} 1 --ascents 1 --step-size 32/255",
        "the same with noise of one eps": f"{FREE} 1 --ascents 1 --step-size 32/255 --noise 1",
        "one ascent, m=2, W=8, step 2 eps": f"{FREE} 2 --ascents 1 --window 8 --step-size 32/255",
        "FGSM-RS": "--method fgsm-rs",
        "N-FGSM": ONE,
        "N-FGSM, two replays, W=8": f"{ONE} --replays 2 --window 8",
        "natural for 0.3 of the cost, then N-FGSM": LATE,
    },
    "mixed": {  # one change at a time beside N-FGSM, at its cost
        "N-FGSM": ONE,
        "natural for 0.3 of the cost, then N-FGSM": LATE,
        "with averaged weights": f"{ONE} --ema 0.999",
        "with noise that fades": f"{ONE} --later 0.5 noise=1 --later 0.8 noise=0.5",
        "with eps that rises": f"{ONE} --eps 4/255 --later 0.3 eps=6/255 --later 0.6 eps=8/255 {EPS_8}",
        "with delta carried over, noise of one eps": f"{ONE} --start carry --noise 1",
        "with two replays, W=8": f"{ONE} --replays 2 --window 8",
        "natural for 0.3 of the cost, then N-FGSM, averaged": f"{LATE} --ema 0.999",
        "FGSM-RS": "--method fgsm-rs",
        "natural for 0.3 of the cost, then FGSM-RS": (
            f"{FREE} 1 --start uniform --step-size 10/255 --later 0.3 ascents=1"
        ),
    },
    "wide": {
        "natural": "--method natural",
        **{f"Free, m=8, W={w}": f"{FREE} 8 --window {w}" for w in (1, 8)},
        "Free, m=8, W=8, smoothed, averaged": f"{TURNS} {BOTH}",
        "Free, m=8, W=16, eps 9/255, smoothed": (
            f"{FREE} 8 --window 16 --eps 9/255 {EPS_8} --label-smoothing 0.1"
        ),
        "N-FGSM, half the passes": "--method n-fgsm --passes 12",
        "N-FGSM, half the passes, smoothed, averaged": f"--method n-fgsm --passes 12 {BOTH}",
    },
}
# An ascent costs 0.8 of an update of this network on the machine of the study.
RESIDUAL = (
    "--model preactresnet-16-1 --lr 0.2 --ascent-cost 0.8 --channels-last --test-batch 1000 "
    "--test-images 4000 --hard-images 1000 --weights last --attacks pgd-20-1 cw-40 autoattack"
)
SMALLER = f"--model cnn-16 --images 20000 --passes 30 {JUDGED}"
BASES = {  # arguments of all rows, SMALL where none are given
    "window": SMALLER,
    "extras": f"{SMALLER} --lr 0.2",
    "frontier": f"{RESIDUAL} --passes 20 --looks 5",
    "mixed": f"{RESIDUAL} --passes 20 --looks 5 --images 20000",
    "sixteen": f"{RESIDUAL} --passes 10 --looks 10 --eps 16/255 --test-eps 8/255",
    "wide": f"--model cnn-32 --passes 24 --lr 0.2 --amp bf16 {JUDGED}",
}
QUICKS = {  # without AutoAttack
    **dict.fromkeys(BASES, "--attacks pgd-20-1 pgd-50"),
    **dict.fromkeys(("frontier", "mixed", "sixteen"), "--attacks pgd-20-1 cw-40"),
}
RATES = {"window": ("0.1", "0.2")}  # of which each row takes the one that is better held out


def run(
    label: str,
    arguments: str,
    seed: int,
    args: argparse.Namespace,
    lr: str = "",
    judge: bool = True,
) -> dict[str, Any]:
    """The record of one run: made now, or found; without its attacks if nothing is to be judged but the curve."""
    name = f"{label} lr {lr}" if lr else label
    name = "".join(c if c.isalnum() else "-" for c in name)
    out = args.out / f"{name}-{seed}"
    natural = shlex.quote(str(args.out / f"natural-{seed}" / "weights.pt"))
    arguments += "" if seed < args.full_seeds else f" {QUICKS.get(args.study, QUICK)}"
    arguments += f" --lr {lr}" if lr else ""
    line = f"{BASES.get(args.study, SMALL)} {arguments.format(natural=natural)} --seed {seed}"
    argv = [*shlex.split(line), *args.rest, "--data", str(args.data), "--out", str(out)]
    wanted = cifar10.parse(argv)
    if not wanted.attacks:
        raise SystemExit("--attacks needs at least one attack: a table is made of them")
    asked = set(wanted.attacks) if judge else set()
    if (result := out / "result.json").exists():
        record = json.loads(result.read_text())
        was, now = record["arguments"], cifar10.arguments(wanted)
        for key in (*cifar10.of_training(now), "test_images"):
            if was.get(key) != now[key]:
                raise SystemExit(
                    f"{out} has {key} {was.get(key)}, not {now[key]}: take another --out"
                )
        if asked <= {a["name"] for a in record["results"]}:
            return {"label": label, **record}
    print(f"{label}, seed {seed}{f', rate {lr}' if lr else ''}", file=sys.stderr)
    cifar10.main(argv if judge else [*argv, "--attacks"])
    return {"label": label, **json.loads(result.read_text())}


def rate(label: str, arguments: str, args: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """The learning rate of a row, and the held-out accuracies by which it is chosen, at the last look of seed 0."""
    key = "clean" if "natural" in arguments else "robust"
    scores = {
        lr: run(label, arguments, 0, args, lr, judge=False)["curve"][-1][key]
        for lr in RATES.get(args.study, ())
    }
    return max(scores, key=scores.__getitem__, default=""), scores


def named(result: dict[str, Any], first: str) -> str:
    """An attack by name, and by the weights that it has met if they are not those of the `first` results."""
    weights = result.get("weights", "best")
    return result["name"] + (f", {weights} weights" if weights != first else "")


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a name of its own for every result."""
    first = record["results"][0].get("weights", "best")
    return {**record, "results": [{**r, "name": named(r, first)} for r in record["results"]]}


def attacks_of_all(runs: list[dict[str, Any]]) -> list[str]:
    """The attacks by which every label has been judged, with at least one seed."""
    names: dict[str, set[str]] = {}
    for r in runs:
        names.setdefault(r["label"], set()).update(a["name"] for a in r["results"])
    found = [{a["name"]: a["robust"] for a in r["results"]} for r in runs]
    alike = {  # the best weights are the last ones in every run
        name
        for name in found[0]
        if name.endswith(" weights")
        and all(r.get(name) == r.get(name.rsplit(", ", 1)[0]) for r in found)
    }
    return [
        name for name in found[0] if all(name in m for m in names.values()) and name not in alike
    ]


def costs(runs: list[dict[str, Any]]) -> list[float]:
    """Training time relative to the first label with the same seed; on a CPU processor time, which other load spares."""
    clock = "cpu_seconds" if runs[0]["environment"]["machine"].endswith("CPU") else "seconds"
    base = {r["arguments"]["seed"]: r[clock] for r in runs if r["label"] == runs[0]["label"]}
    usual = mean(base.values())  # for a seed that the first label has not been run with
    return [r[clock] / base.get(r["arguments"]["seed"], usual) for r in runs]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Rows in Markdown: relative cost, and accuracies in %."""
    attacks, cost = attacks_of_all(runs), costs(runs)
    seeds = len({r["arguments"]["seed"] for r in runs})
    lines = [
        " | ".join(["| method", "time, relative", "clean %", *(f"{a} %" for a in attacks)]) + " |",
        "| --- " * (3 + len(attacks)) + "|",
    ]
    for label in dict.fromkeys(r["label"] for r in runs):
        mine = [r for r in runs if r["label"] == label]
        time = mean(c for c, r in zip(cost, runs, strict=True) if r["label"] == label)
        clean = spread([100 * r["results"][0]["clean"] for r in mine])
        cells = [f"| {label}", f"{time:.2f}", clean]
        for attack in attacks:
            found = [100 * a["robust"] for r in mine for a in r["results"] if a["name"] == attack]
            cells.append(spread(found) + (f" (seeds: {len(found)})" if len(found) < seeds else ""))
        lines.append(" | ".join(cells) + " |")
    return lines


def draw(runs: list[dict[str, Any]], path: Path, study: str) -> None:
    """Accuracy, clean and under the first attack, with the cost: a mark a run."""
    attack, cost = attacks_of_all(runs)[0], costs(runs)
    rows = [
        {"label": r["label"], "cost": c, "clean": r["results"][0]["clean"], "robust": a["robust"]}
        for c, r in zip(cost, runs, strict=True)
        for a in r["results"]
        if a["name"] == attack
    ]
    figure, axes = plots.plt.subplots(figsize=(7.5, 4))
    if study in BASES:  # all of one cost
        plots.clean_against_robust(axes, rows, attack)
        plots.save(figure, path)
        return
    plots.accuracy_against_cost(axes, rows, attack)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"training time relative to {runs[0]['label']}", ylim=(0, None))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plots.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--full-seeds", type=int, default=1, help="seeds with AutoAttack, minutes each"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these, by name")
    once = "rows with seed 0 only, by name"
    parser.add_argument("--once", nargs="+", default=[], metavar="ROW", help=once)
    parser.add_argument("--json", type=Path, help="all results")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv[:cut])
    args.rest = argv[cut + 1 :]
    rows = STUDIES[args.study]
    if args.rows:
        rows = {label: rows[label] for label in args.rows}
    rates = {label: rate(label, arguments, args) for label, arguments in rows.items()}
    runs = [
        flat(run(label, arguments, seed, args, rates[label][0]))
        for seed in range(args.seeds)
        for label, arguments in rows.items()
        if seed == 0 or label not in args.once
    ]
    if args.json:
        chosen = {"rates": {label: scores for label, (_, scores) in rates.items() if scores}}
        write(args.json, {"study": args.study, **chosen, "runs": runs, "table": table(runs)})
    if args.plot:
        draw(runs, args.plot, args.study)
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
