"""Free adversarial training with Accelerate, accumulation and checkpoints, on handwritten digits.

python examples/hosts/with_accelerate.py
accelerate launch --cpu --num_processes 2 examples/hosts/with_accelerate.py --accumulate 2
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import parser
from digits import network, test_set, train_set
from torch import nn
from torch.utils.data import DataLoader, Subset

from free_adv import FreeAdversarial, evaluate  # free-adv


def main() -> None:
    options = parser(__doc__, passes=40, eps=0.15, lr=0.1)
    options.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none")
    options.add_argument("--cpu", action="store_true", help="the CPU even if there is a GPU")
    options.add_argument("--accumulate", type=int, default=1, help="micro-batches per update")
    options.add_argument(
        "--out", type=Path, help="save each epoch in this folder, and go on from it"
    )
    args = options.parse_args()

    train, test = train_set(), test_set()
    if args.dry_run:
        args.passes, args.batch_size = 3, 4
        train, test = (Subset(data, range(12)) for data in (train, test))
    set_seed(args.seed)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision="no" if args.amp == "none" else args.amp,
        gradient_accumulation_steps=args.accumulate,
    )
    micro = args.batch_size // accelerator.num_processes // args.accumulate or 1
    loader = DataLoader(train, micro, shuffle=True)
    model = network()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    free = FreeAdversarial(  # free-adv: one gradient of the input before each update
        eps=args.eps,
        replays=1,
        ascents=1,
        objective=lambda batch: criterion(model(batch[0]), batch[1]),
        start="zero",
        noise=2,
        accumulate=args.accumulate,
    )
    epochs, loader = free.epochs(args.passes), free.replay(loader)  # free-adv: after prepare
    accelerator.register_for_checkpointing(free)  # free-adv: for save_state and load_state

    # Once for each replay and process: Accelerate skips the replays that do not update.
    updates = epochs * -(-len(loader) // args.accumulate) * accelerator.num_processes
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=updates)
    schedule = accelerator.prepare(schedule)
    first = 0
    if args.out and (args.out / "epoch.txt").exists():
        accelerator.load_state(args.out)
        first = int((args.out / "epoch.txt").read_text())

    for epoch in range(first, epochs):
        loader.set_epoch(epoch)
        for x, y in loader:
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = criterion(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if args.out:
            accelerator.save_state(args.out)
            (args.out / "epoch.txt").write_text(str(epoch + 1))

    if accelerator.is_main_process:
        net = accelerator.unwrap_model(model)
        result = evaluate(net, DataLoader(test, len(test)), free.threat, steps=40)
        accelerator.print(f"processes={accelerator.num_processes} epochs={epochs}: {result}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
