"""Free adversarial training on several ranks with DistributedDataParallel, on handwritten digits.

    torchrun --nproc-per-node 2 examples/with_ddp.py

Each rank perturbs its own share of the batch; nothing but the gradients of the weights is exchanged.
"""

import argparse
import os

import torch
from digits import network, test_set, train_set
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset

from free_adv import FreeAdversarial, evaluate  # free-adv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=40, help="natural epochs: the cost")
    parser.add_argument("--replays", type=int, default=8, help="the paper's m")
    parser.add_argument("--eps", type=float, default=0.15, help="linf radius, images are in [0, 1]")
    parser.add_argument("--batch-size", type=int, default=64, help="of all ranks together")
    parser.add_argument("--lr", type=float, default=0.1, help="peak of the OneCycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="two updates, to see that it runs")
    args = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()

    train, test = train_set(), test_set()
    if args.dry_run:
        args.epochs = args.replays = 2
        train, test = (Subset(data, range(16)) for data in (train, test))
    sampler = DistributedSampler(train, seed=args.seed)
    loader = DataLoader(train, args.batch_size // ranks, sampler=sampler)

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(network().to(device))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    free = FreeAdversarial(optimizer, eps=args.eps, replays=args.replays, device=device)  # free-adv
    epochs, batches = free.epochs(args.epochs), free.replay(loader)  # free-adv
    updates = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=updates)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in batches:
            free.step(criterion(model(x), y))  # free-adv
            schedule.step()

    if rank == 0:  # the model itself: a forward pass through DDP would wait for the other ranks
        result = evaluate(model.module, DataLoader(test, len(test)), free.threat, steps=40)
        print(f"{ranks} ranks, {updates} updates: {result}")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
