"""Free adversarial training on several ranks, on handwritten digits: DistributedDataParallel, or FSDP2.

    torchrun --nproc-per-node 2 examples/hosts/with_ddp.py
    torchrun --nproc-per-node 2 examples/hosts/with_ddp.py --fsdp

With --fsdp, from torch 2.6 on, the weights are in pieces; without it every rank has all of them. Either way each rank
perturbs its own share of the batch, and delta is never exchanged.
"""

import os

import torch
from arguments import parser
from digits import network, test_set, train_set
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset

from free_adv import FreeAdversarial, evaluate  # free-adv


def shard(model: nn.Sequential, device: torch.device, ranks: int) -> None:
    """Each block of convolution and batch norm on its own, then what is left."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    for block in model[:3]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main() -> None:
    options = parser(__doc__, passes=40, eps=0.15, lr=0.1)
    options.add_argument("--fsdp", action="store_true", help="shard the weights over the ranks")
    args = options.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()

    train, test = train_set(), test_set()
    if args.dry_run:
        args.passes = 3
        train, test = (Subset(data, range(16)) for data in (train, test))
    sampler = DistributedSampler(train, seed=args.seed)
    loader = DataLoader(train, args.batch_size // ranks, sampler=sampler)

    torch.manual_seed(args.seed)
    net = network().to(device)
    if args.fsdp:
        shard(net, device, ranks)
    model = net if args.fsdp else DistributedDataParallel(net)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    free = FreeAdversarial(  # free-adv: one gradient of the input before each update
        optimizer,
        eps=args.eps,
        replays=1,
        ascents=1,
        objective=lambda batch: criterion(model(batch[0]), batch[1]),
        start="zero",
        noise=2,
        device=device,
    )
    epochs, batches = free.epochs(args.passes), free.replay(loader)  # free-adv
    updates = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=updates)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in batches:
            free.step(criterion(model(x), y))  # free-adv
            schedule.step()

    # Every rank attacks the same images, by a model in one piece: gloo may abort a process that ends right
    # behind a collective.
    whole = network().to(device)
    whole.load_state_dict(get_model_state_dict(net, options=StateDictOptions(full_state_dict=True)))
    result = evaluate(whole, DataLoader(test, len(test)), free.threat, steps=40, progress=rank == 0)
    if rank == 0:
        print(f"ranks={ranks} updates={updates} fsdp={args.fsdp}: {result}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
