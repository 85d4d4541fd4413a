"""A small training job that goes on from its last checkpoint however it ended: what `test_faults.py` kills.

    python tests/training_job.py --out FOLDER

It has everything that a resumed run must bring back: a shuffled loader with workers, dropout, momentum, a loss scale that
moves, delta, and a minibatch whose replays are not all made.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

sys.path.append(str(Path(__file__).parents[1] / "examples" / "experiments"))
import records

from free_adv import FreeAdversarial

IMAGES, BATCH, EPOCHS = 40, 16, 2  # the last batch of an epoch is a short one
INTERRUPTED = 130  # what a shell reports after Ctrl-C


class Numbered(Dataset):
    """Images that know their number, so that the order of the data can be compared."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(IMAGES, 3, 8, 8, generator=generator)

    def __len__(self):
        return IMAGES

    def __getitem__(self, number):
        return self.images[number], number % 10, number


class Job:
    """Everything that moves, and the file that keeps it."""

    def __init__(self, args):
        self.args, self.last = args, args.out / "last.pt"
        torch.manual_seed(0)
        layers = nn.Linear(192, 1024), nn.ReLU(), nn.Dropout(0.2), nn.Linear(1024, 512), nn.ReLU()
        self.model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(512, 10))
        if args.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        # So large and fast a scale overflows now and then.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
        settings = {"eps": 8 / 255, "replays": args.replays, "scaler": self.scaler}
        self.free = FreeAdversarial(self.optimizer, **settings)
        self.loader = StatefulDataLoader(
            Numbered(),
            BATCH,
            shuffle=True,
            num_workers=2,
            generator=torch.Generator().manual_seed(2),  # or it would draw from the global one
        )
        self.epoch, self.order, self.losses = 0, [], []
        self.random = records.random_state()

    def save(self):
        parts = self.model, self.optimizer, self.scaler, self.free, self.loader
        names = "model", "optimizer", "scaler", "free", "loader"
        state = {name: part.state_dict() for name, part in zip(names, parts, strict=True)}
        progress = {"epoch": self.epoch, "order": self.order, "losses": self.losses}
        records.save(self.last, {**state, **progress, "random": self.random})

    def resume(self):
        if not self.last.exists():
            return
        state = records.load(self.last)
        for name in ("model", "optimizer", "scaler", "free", "loader"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch, self.order, self.losses = (state[n] for n in ("epoch", "order", "losses"))
        self.random = state["random"]
        records.set_random_state(self.random)

    def train(self):
        while self.epoch < EPOCHS:
            for x, y, numbers in self.free.replay(self.loader):
                with torch.autocast("cpu", torch.float16):
                    output = self.model(x)
                    self.wait("forward")
                    output.register_hook(lambda grad: self.wait("backward"))
                    loss = functional.cross_entropy(output, y)
                self.free.step(loss)
                # What is not in a state of torch's is set after the update: a replay that is
                # interrupted is made again, with the same dropout.
                self.random = records.random_state()
                self.losses.append(loss.item())
                self.order.append(numbers.tolist())
                if len(self.order) % self.args.save_updates == 0:
                    self.save()
            self.epoch += 1
        self.save()

    def wait(self, place):
        """Wait for an interrupt at the place where one is asked for."""
        if self.args.wait == f"{place} {len(self.order) + 1}":
            print("waits", flush=True)  # noqa: T201
            time.sleep(100)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the checkpoint")
    add("--optimizer", choices=["sgd", "adamw"], default="sgd")
    add("--replays", type=int, default=3, help="the paper's m")
    add("--save-updates", type=int, default=1, help="updates between checkpoints")
    add("--wait", help="'forward N' or 'backward N': wait for Ctrl-C in that pass of update N")
    return parser.parse_args(arguments)


def run(job):
    try:
        job.resume()
        job.train()
    except KeyboardInterrupt:
        job.save()
        sys.exit(INTERRUPTED)


def main():
    job = Job(parse())
    print("begins", flush=True)  # noqa: T201
    run(job)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
