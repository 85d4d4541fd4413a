"""Free adversarial training with Lightning's automatic optimisation, on handwritten digits.

    python examples/hosts/with_lightning.py
    python examples/hosts/with_lightning.py --devices 2 --amp bf16 --accumulate 2

The module knows nothing of it: only the loader is wrapped.
"""

import os

import lightning
import torch
from arguments import parser
from digits import network, test_set, train_set
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from free_adv import FreeAdversarial, evaluate  # free-adv

PRECISION = {"none": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Digits(lightning.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net, self.lr = network(), lr
        self.criterion = nn.CrossEntropyLoss()

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return self.criterion(self.net(x), y)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        updates = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=updates)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main() -> None:
    options = parser(__doc__, passes=40, eps=0.15, lr=0.1)
    options.add_argument("--devices", type=int, default=1)
    options.add_argument("--accelerator", default="auto")
    options.add_argument("--amp", choices=PRECISION, default="none")
    options.add_argument("--accumulate", type=int, default=1, help="micro-batches per update")
    args = options.parse_args()

    train, test = train_set(), test_set()
    if args.dry_run:
        args.passes, args.batch_size = 3, 2
        train, test = (Subset(data, range(8)) for data in (train, test))
    lightning.seed_everything(args.seed, verbose=False)
    cuda = torch.cuda.is_available() and args.accelerator != "cpu"
    module = Digits(args.lr)

    def objective(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with trainer.precision_plugin.forward_context():  # autocast, which fit opens round its step
            return module.loss(batch)

    free = FreeAdversarial(  # free-adv: one gradient of the input before each update
        eps=args.eps,
        replays=1,
        ascents=1,
        objective=objective,
        start="zero",
        noise=2,
        accumulate=args.accumulate,
        # Where the trainer trains.
        device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else None,
    )
    trainer = lightning.Trainer(
        max_epochs=free.epochs(args.passes),  # free-adv
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        precision=PRECISION[args.amp],
        accumulate_grad_batches=args.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not args.dry_run,
    )
    ranks = trainer.world_size
    # With several devices Lightning would replace the sampler of a plain DataLoader by this one.
    sampler = DistributedSampler(train, ranks, trainer.global_rank, seed=args.seed)
    loader = DataLoader(train, args.batch_size // ranks // args.accumulate or 1, sampler=sampler)
    trainer.fit(module, free.replay(loader))  # free-adv

    if trainer.is_global_zero:
        result = evaluate(module.net, DataLoader(test, len(test)), free.threat, steps=40)
        print(f"devices={ranks} updates={trainer.global_step}: {result}")


if __name__ == "__main__":
    main()
