"""Free adversarial training on several ranks with DistributedDataParallel, on handwritten digits.

    torchrun --nproc-per-node 2 examples/with_ddp.py

Each rank perturbs its own share of the batch; nothing but the gradients of the weights is exchanged.
"""

import os

import torch
from arguments import parser
from digits import network, test_set, train_set
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset

from free_adv import FreeAdversarial, evaluate  # free-adv


def main() -> None:
    options = parser(__doc__, passes=40, replays=8, eps=0.15, lr=0.1)
    args = options.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()

    train, test = train_set(), test_set()
    if args.dry_run:
        args.passes = args.replays = 2
        train, test = (Subset(data, range(16)) for data in (train, test))
    sampler = DistributedSampler(train, seed=args.seed)
    loader = DataLoader(train, args.batch_size // ranks, sampler=sampler)

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(network().to(device))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    free = FreeAdversarial(optimizer, eps=args.eps, replays=args.replays, device=device)  # free-adv
    epochs, batches = free.epochs(args.passes), free.replay(loader)  # free-adv
    updates = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=updates)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in batches:
            free.step(criterion(model(x), y))  # free-adv
            schedule.step()

    # The model itself, by every rank: gloo may abort a process that ends right behind a collective.
    loader = DataLoader(test, len(test))
    result = evaluate(model.module, loader, free.threat, steps=40, progress=rank == 0)
    if rank == 0:
        print(f"ranks={ranks} updates={updates}: {result}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
