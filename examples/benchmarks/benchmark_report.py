"""What `benchmark.py` shows of its rows: targets and tables."""

import argparse
import math

INPUT_GRAD = "input-grad"  # natural, with the gradient of the input that an adversary needs
METHODS = "natural", INPUT_GRAD, "free", "free-public", "fgsm-rs", "n-fgsm", "pgd", "pgd-plain"
COUNTED = "natural", INPUT_GRAD, "free", "free-public"  # whose operations are counted


def targets(row: dict, natural: dict, args: argparse.Namespace) -> list[dict]:
    """What is aimed at, beside what was measured; on a CPU in processor time, which other load spares."""
    method, clock, size = row["method"], row["clock"], int(row["model"].split(":")[1])
    cuda = row["synchronisations"] is not None
    found = []

    def add(what: str, value: float, least: float = 0.0, most: float = math.inf) -> None:
        limit = {"at_least": least} if least else {"at_most": most}
        found.append({"what": what, "value": value, **limit, "met": least <= value <= most})

    most = 1.01 if cuda else {96: 1.05, 224: 1.03}.get(size)
    if args.loader:
        most = 1 / args.replays + 0.15
    if method == "free" and most:
        add("time / natural", row[f"{clock}_to_natural"]["median"], most=most)
    if method == "free" and row["memory"] is not None:
        delta = 4 * 3 * args.batch_size * size**2
        extra = row["memory"] - natural["memory"]
        add("extra memory / delta", extra / delta, most=3)
    least = {"pgd": 5.5, "pgd-plain": 7.5}.get(method)
    if least and not args.loader and f"{clock}_to_free" in row:
        add("time / free", row[f"{clock}_to_free"]["median"], least=least)
    if method == "n-fgsm" and not args.loader and f"{clock}_to_free" in row:
        # A compiled backward pass makes the gradients of the weights too.
        ascent = row[f"{clock}_to_free"]["median"] - 1
        add("ascent / update", ascent, most=1.1 if args.compile else 0.7)
    return found


def show(rows: list[dict]) -> None:
    width = max(len(row["model"]) for row in rows)
    head = f"{'model':<{width}}  dtype  {'method':<12}{'ms per update':>24}"
    print(f"{head}{'wall / natural':>21}{'cpu / natural':>21}{'MiB':>9}{'syncs':>7}  targets")
    for row in rows:
        columns = ("wall_ms", 2), ("wall_to_natural", 3), ("processor_to_natural", 3)
        shown = ["{median:.{n}f} ({q1:.{n}f}-{q3:.{n}f})".format(n=n, **row[c]) for c, n in columns]
        memory = "" if row["memory"] is None else f"{row['memory'] / 2**20:.1f}"
        waits = "" if row["synchronisations"] is None else f"{row['synchronisations']:g}"
        verdicts = [
            (t["what"], f"{t['value']:.3f}", "met" if t["met"] else "MISSED")
            for t in row["targets"]
        ]
        print(
            f"{row['model']:<{width}}  {row['dtype']:<7}{row['method']:<12}{shown[0]:>24}", end=""
        )
        print(
            f"{shown[1]:>21}{shown[2]:>21}{memory:>9}{waits:>7}  {'; '.join(map(' '.join, verdicts))}"
        )


def ratios(rows: list[dict]) -> list[str]:
    """Time of an update relative to natural's, in Markdown: a row for each model and dtype."""
    methods = [m for m in METHODS if m in {row["method"] for row in rows} and m != "natural"]
    lines = ["| model | dtype | natural, ms | " + " | ".join(methods) + " |"]
    lines.append("| --- " * (3 + len(methods)) + "|")
    for place in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        mine = {r["method"]: r for r in rows if (r["model"], r["dtype"]) == place}
        clock = mine["natural"]["clock"]
        cells = [*place, f"{mine['natural'][f'{clock}_ms']['median']:.0f}"]
        for method in methods:
            ratio = mine[method][f"{clock}_to_natural"]
            cells.append("{median:.3f}<br>({q1:.2f}–{q3:.2f})".format(**ratio))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def work(rows: list[dict]) -> list[str]:
    """Floating-point operations of an update, in Markdown: of natural per image, of the others relative to it."""
    methods = [m for m in COUNTED[1:] if m in {row["method"] for row in rows}]
    lines = ["| model | natural, GFLOP per image | " + " | ".join(methods) + " |"]
    lines.append("| --- " * (2 + len(methods)) + "|")
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = {r["method"]: r["gflop_per_image"] for r in reversed(rows) if r["model"] == model}
        if mine["natural"] is not None:
            cells = [model, f"{mine['natural']:.2f}"]
            cells += [f"{mine[method] / mine['natural']:.4f}" for method in methods]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdicts(rows: list[dict]) -> list[str]:
    """Targets beside what was measured, in Markdown."""
    lines = ["| model | dtype | what | target | measured | met |", "| --- " * 6 + "|"]
    for row in rows:
        for t in row["targets"]:
            limit = f"≤ {t['at_most']:.2f}" if "at_most" in t else f"≥ {t['at_least']:.2f}"
            what = t["what"].replace("time", f"time of {row['method']}")
            cells = [row["model"], row["dtype"], what, limit, f"{t['value']:.3f}"]
            lines.append(f"| {' | '.join(cells)} | {'yes' if t['met'] else 'no'} |")
    return lines
