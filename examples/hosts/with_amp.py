"""Free adversarial training in mixed precision, with gradient clipping: plain PyTorch, on handwritten digits.

python examples/hosts/with_amp.py --amp fp16
"""

import torch
from arguments import parser
from digits import network, test_set, train_set
from torch import nn
from torch.utils.data import DataLoader, Subset

from free_adv import FreeAdversarial, evaluate  # free-adv

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    options = parser(__doc__, passes=40, eps=0.15, lr=0.1)
    options.add_argument("--amp", choices=DTYPES, default="bf16")
    options.add_argument(
        "--max-grad-norm", type=float, default=1.0, help="clip the gradient at this"
    )
    args = options.parse_args()

    train, test = train_set(), test_set()
    if args.dry_run:
        args.passes = 3
        train, test = (Subset(data, range(16)) for data in (train, test))
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.amp]
    loader = DataLoader(train, args.batch_size, shuffle=True, pin_memory=device.type == "cuda")

    model = network().to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def objective(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        with torch.autocast(device.type, dtype):
            return criterion(model(x), y)

    free = FreeAdversarial(  # free-adv: one gradient of the input before each update
        optimizer,
        eps=args.eps,
        replays=1,
        ascents=1,
        objective=objective,
        start="zero",
        noise=2,
        scaler=scaler,
        max_grad_norm=args.max_grad_norm,
        device=device,
    )
    epochs, batches = free.epochs(args.passes), free.replay(loader)  # free-adv
    updates = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=updates)

    for _ in range(epochs):
        for batch in batches:
            free.step(objective(batch))  # free-adv: scale, backward, unscale, clip, step, update
            schedule.step()

    result = evaluate(model, DataLoader(test, len(test)), free.threat, steps=40)
    print(f"amp={args.amp} updates={updates}: {result}")


if __name__ == "__main__":
    main()
