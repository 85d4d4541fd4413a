"""Free adversarial training in mixed precision, with gradient clipping: plain PyTorch, on handwritten digits.

python examples/with_amp.py --precision fp16
"""

import argparse

import torch
from digits import network, test_set, train_set
from torch import nn
from torch.utils.data import DataLoader, Subset

from free_adv import FreeAdversarial, evaluate  # free-adv

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--epochs", type=int, default=40, help="natural epochs: the cost")
    parser.add_argument("--replays", type=int, default=8, help="the paper's m")
    parser.add_argument("--eps", type=float, default=0.15, help="linf radius, images are in [0, 1]")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1, help="peak of the OneCycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="two updates, to see that it runs")
    args = parser.parse_args()

    train, test = train_set(), test_set()
    if args.dry_run:
        args.epochs = args.replays = 2
        train, test = (Subset(data, range(16)) for data in (train, test))
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.precision]
    loader = DataLoader(train, args.batch_size, shuffle=True, pin_memory=device.type == "cuda")

    model = network().to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    free = FreeAdversarial(  # free-adv: `device` moves each batch once for all its replays
        optimizer,
        eps=args.eps,
        replays=args.replays,
        scaler=scaler,
        max_grad_norm=args.clip,
        device=device,
    )
    epochs, batches = free.epochs(args.epochs), free.replay(loader)  # free-adv
    updates = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=updates)

    for _ in range(epochs):
        for x, y in batches:
            with torch.autocast(device.type, dtype):
                loss = criterion(model(x), y)
            free.step(loss)  # free-adv: scale, backward, unscale, clip, step, update
            schedule.step()

    result = evaluate(model, DataLoader(test, len(test)), free.threat, steps=40)
    print(f"{args.precision}, {updates} updates: {result}")


if __name__ == "__main__":
    main()
