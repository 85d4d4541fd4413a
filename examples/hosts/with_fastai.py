"""Free adversarial training with a Learner of fastai and its one-cycle policy, on handwritten digits.

pip install fastai && python examples/hosts/with_fastai.py
"""

import torch
from arguments import parser
from digits import network, test_set, train_set
from fastai.vision.all import DataLoader, DataLoaders, Learner, OptimWrapper, partial
from torch import nn
from torch.utils.data import Subset

from free_adv import FreeAdversarial, evaluate  # free-adv


def main() -> None:
    args = parser(__doc__, passes=40, replays=8, eps=0.15, lr=0.1).parse_args()

    train, test = train_set(), test_set()
    if args.dry_run:
        args.passes = args.replays = 2
        train, test = (Subset(data, range(16)) for data in (train, test))
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = DataLoader(train, bs=args.batch_size, shuffle=True, device=device)
    valid = DataLoader(test, bs=len(test), device=device)

    free = FreeAdversarial(eps=args.eps, replays=args.replays, device=device)  # free-adv
    epochs, batches = free.epochs(args.passes), free.replay(loader)  # free-adv
    sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
    data = DataLoaders(batches, valid, device=device)
    learner = Learner(data, network(), loss_func=nn.CrossEntropyLoss(), opt_func=sgd)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(epochs, args.lr, wd=0.0)

    result = evaluate(learner.model, valid, free.threat, steps=40)
    print(f"updates={epochs * len(batches)}: {result}")


if __name__ == "__main__":
    main()
