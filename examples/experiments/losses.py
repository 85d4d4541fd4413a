"""Free adversarial training with losses that have a clean part, on scikit-learn's handwritten digits.

    python examples/experiments/losses.py

Trains the network of compare.py with Free on the cross-entropy, and on losses like those of TRADES and MART.
"""

import time
from pathlib import Path
from statistics import mean, stdev

import torch
from compare import conclude, data, network, parser
from torch.nn import functional
from tqdm import tqdm

from free_adv import FreeAdversarial, ThreatModel, evaluate


def trades(logits, clean_logits, y, beta=6.0):
    """Cross-entropy on the clean images; the perturbed ones are to be answered like them."""
    clean, attacked = (functional.log_softmax(z, 1) for z in (clean_logits, logits))
    gap = functional.kl_div(attacked, clean, reduction="batchmean", log_target=True)
    return functional.cross_entropy(clean_logits, y) + beta * gap


def mart(logits, clean_logits, y, weight=5.0):
    """A boosted cross-entropy on the perturbed images, and the gap, where the clean answer is unsure."""
    clean, attacked = (functional.log_softmax(z, 1) for z in (clean_logits, logits))
    rival = attacked.exp().scatter(1, y[:, None], 0).amax(1)
    boosted = functional.nll_loss(attacked, y) - torch.log(1 - rival + 1e-4).mean()
    gap = functional.kl_div(attacked, clean, reduction="none", log_target=True).sum(1)
    unsure = 1 - clean.exp().gather(1, y[:, None])[:, 0]
    return boosted + weight * (gap * unsure).mean()


LOSSES = {
    "natural": None,
    "Free, cross-entropy": None,
    "Free, like TRADES": trades,
    "Free, like MART": mart,
    "Free, like TRADES, half the passes": trades,
}


def train(args, name: str, seed: int) -> tuple[torch.nn.Module, float]:
    """A network trained by `name`, and the processor time that it took."""
    torch.manual_seed(seed)
    loader, _ = data(args.batch_size, seed)
    model, loss = network(), LOSSES[name]
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    m = 1 if name == "natural" else args.replays
    free = FreeAdversarial(optimizer, eps=args.eps, replays=m)
    epochs = free.epochs(args.passes // 2 if name.endswith("half the passes") else args.passes)
    batches = loader if name == "natural" else free.replay(loader)
    updates = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=updates)
    begun = time.process_time()
    for _ in range(epochs):
        for x, y in batches:
            if name == "natural":
                optimizer.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            elif loss is None:
                free.step(functional.cross_entropy(model(x), y))
            else:
                free.step(loss(model(x), model(free.clean), y))
            schedule.step()
    return model, time.process_time() - begun


def main() -> None:
    options = parser(__doc__, passes=40, replays=8, eps=0.15, lr=0.1)
    options.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    options.add_argument("--json", type=Path, help="write the results there too")
    args = options.parse_args()
    if args.dry_run:
        args.passes, args.replays = 4, 2
        args.seeds = 1
    torch.set_num_threads(1)  # several would wait for one another: the network is small
    threat, steps = ThreatModel(args.eps), 1 if args.dry_run else 40
    _, test = data(64, 0)
    train(args, "natural", 0)  # the first pass of a process is slow: let it not count
    rows = []
    for name in tqdm(LOSSES, leave=False):
        runs = [train(args, name, seed) for seed in range(args.seed, args.seed + args.seeds)]
        found = [evaluate(model, test, threat, steps=steps, progress=False) for model, _ in runs]
        row = {"loss": name, "seconds": [seconds for _, seconds in runs]}
        row |= {"clean": [100 * r.clean for r in found], "robust": [100 * r.robust for r in found]}
        rows.append(row)
    table = [
        f"| training, m={args.replays} | time, relative | clean % | PGD-40 % |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        relative = mean(row["seconds"]) / mean(rows[0]["seconds"])
        spread = stdev(row["robust"]) if args.seeds > 1 else 0.0
        robust = f"{mean(row['robust']):.1f} ± {spread:.1f}"
        table.append(f"| {row['loss']} | {relative:.2f} | {mean(row['clean']):.1f} | {robust} |")
    print("\n".join(table))
    conclude(args, found[0], rows, table)


if __name__ == "__main__":
    main()
