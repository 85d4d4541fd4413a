"""What the details of free adversarial training are worth, on scikit-learn's handwritten digits.

    python examples/experiments/variants.py

Trains the network of compare.py with Free as the library does it, and with one detail changed at a time.
"""

from pathlib import Path
from statistics import mean, stdev

import torch
from compare import conclude, data, network, parser
from torch.nn import functional
from tqdm import tqdm

from free_adv import FreeAdversarial, ThreatModel, evaluate

VARIANTS = {
    "as the library does it": {},
    "clamp inside the graph": {"clamp": True},
    "delta zero at each minibatch": {"start": "zero"},
    "delta uniform at each minibatch": {"start": "uniform"},
    "replays of 8 minibatches take turns": {"window": 8},
    "schedule stepped per loader epoch": {"anneal": False},
}


def train(args, seed: int, clamp=False, start="carry", anneal=True, window=1):
    eps, m, passes = args.eps, args.replays, args.passes
    torch.manual_seed(seed)
    loader, _ = data(args.batch_size, seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    free = FreeAdversarial(optimizer, eps=eps, replays=m, start=start, window=window)
    epochs = free.epochs(passes)
    total = epochs * len(free.replay(loader))
    # Without annealing the schedule is as long as the natural training, but moves once an epoch.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=total if anneal else passes
    )
    delta = torch.zeros(args.batch_size, 1, 8, 8)
    for _ in range(epochs):
        if clamp:  # the loop of the public implementations
            for x, y in loader:
                for _ in range(m):
                    noise = delta[: len(x)].clone().requires_grad_()
                    loss = functional.cross_entropy(model((x + noise).clamp(0, 1)), y)
                    optimizer.zero_grad()
                    loss.backward()
                    delta[: len(x)] = (noise.detach() + eps * noise.grad.sign()).clamp(-eps, eps)
                    optimizer.step()
                    schedule.step()
        else:
            for x, y in free.replay(loader):
                free.step(functional.cross_entropy(model(x), y))
                if anneal:
                    schedule.step()
            if not anneal:
                schedule.step()
    return model


def main() -> None:
    options = parser(__doc__, passes=40, replays=8, eps=0.15, lr=0.1)
    options.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    options.add_argument("--json", type=Path, help="write the results there too")
    args = options.parse_args()
    if args.dry_run:
        args.passes = args.replays = 2
        args.seeds = 1
    torch.set_num_threads(1)  # the network is too small for several
    threat = ThreatModel(args.eps)
    _, test = data(64, 0)
    table, rows, lines = (
        [],
        [],
        [f"| Free, m={args.replays} | clean % | PGD-40 % |", "| --- | --- | --- |"],
    )
    for name, changes in tqdm(VARIANTS.items(), leave=False):
        results = []
        for seed in range(args.seed, args.seed + args.seeds):
            model = train(args, seed, **changes)
            results.append(evaluate(model, test, threat, steps=40, progress=False))
        clean, robust = (
            [100 * r[i] for r in ((r.clean, r.robust) for r in results)] for i in (0, 1)
        )
        spread = stdev(robust) if args.seeds > 1 else 0.0
        rows.append({"variant": name, "clean": clean, "robust": robust})
        lines.append(f"| {name} | {mean(clean):.1f} | {mean(robust):.1f} ± {spread:.1f} |")
        table.append(f"{name:<36}{mean(clean):>8.1f}{mean(robust):>9.1f} ± {spread:.1f}")
    print(f"{'Free, m=' + str(args.replays):<36}{'clean':>8}{'PGD-40':>9}")
    print("\n".join(table))
    conclude(args, results[0], rows, lines)


if __name__ == "__main__":
    main()
