"""Free adversarial training with Ignite's supervised trainer, on handwritten digits.

python examples/hosts/with_ignite.py
"""

import torch
from arguments import parser
from digits import network, test_set, train_set
from ignite.engine import Events, create_supervised_trainer
from torch import nn
from torch.utils.data import DataLoader, Subset

from free_adv import FreeAdversarial, evaluate  # free-adv


def main() -> None:
    args = parser(__doc__, passes=40, eps=0.15, lr=0.1).parse_args()

    train, test = train_set(), test_set()
    if args.dry_run:
        args.passes = 3
        train, test = (Subset(data, range(16)) for data in (train, test))
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = DataLoader(train, args.batch_size, shuffle=True)

    model = network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    free = FreeAdversarial(  # free-adv: one gradient of the input before each update
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

    trainer = create_supervised_trainer(model, optimizer, criterion, device)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: schedule.step())
    state = trainer.run(batches, max_epochs=epochs)

    result = evaluate(model, DataLoader(test, len(test)), free.threat, steps=40)
    print(f"updates={state.iteration}: {result}")


if __name__ == "__main__":
    main()
