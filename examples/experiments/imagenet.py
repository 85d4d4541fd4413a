r"""ImageNet, or any folder of images, with any timm model: the paper's large experiment, as a job that survives preemption.

    python examples/experiments/imagenet.py --data imagenet --out runs/free
    torchrun --nproc-per-node 8 examples/experiments/imagenet.py --data imagenet --out runs/free --amp bf16 --channels-last
    torchrun --nproc-per-node 8 examples/experiments/imagenet.py --data 'shards/train-{0000..1023}.tar' --images 1281167 \
        --val imagenet/val --out runs/free

`imagenet` holds train/ and val/ with a folder for each class. The cost is set by `--passes`, natural passes over
the data: an ascent costs two thirds of an update, and a method with more of them makes fewer updates. The same command,
given again, goes on from `--out/last.pt`, bit-equal to a run that was never stopped, as far as the kernels of the device
are deterministic. `--out` must be a directory that all machines share.

On SIGTERM the job finishes its update, saves and exits with 143, which schedulers read as "not done, start it again"; 0 would
tell them that it is done. On Ctrl-C it does the same and exits with 130. A torchrun that gets the signal hands it on, and exits with 1. With `--max-restarts` torchrun
starts the ranks again when one of them dies; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 then, without which they may
read the addresses of those that are gone (pytorch issue 135712).

Reported are the clean accuracy and that under PGD-10 and PGD-50 in steps of eps / 4, the paper's 1/255 at its eps of
4/255, with one random start each, in float32. Images per second count an image once for each update.
"""

import argparse
import contextlib
import functools
import math
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import images
import jobs
import methods
import nets
import plots
import records
import timm
import torch
from interrupts import Interrupts
from options import Help, at_least, demand_autoattack
from timm.models import load_checkpoint
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

from free_adv import FreeAdversarial, ThreatModel, evaluate

# What may be another when a job goes on.
MAY_CHANGE = ("data", "val", "out", "workers", "save_every", "save_updates", "log_every")
MAY_CHANGE += ("eval_every", "eval_images", "autoattack", "dry_run")
PLACES = "data", "val", "out", "init"  # of this machine, not of the result
DRY = {  # the most that a dry run does
    "batch_size": 2,
    "replays": 2,
    "window": 2,
    "passes": 2,
    "warmup": 1,
    "workers": 1,
    "log_every": 1,
    "eval_every": 1,
    "autoattack": 0,
}


def say(text: str) -> None:
    if distributed.get_rank() == 0:
        print(text, flush=True)


def build(args: argparse.Namespace, classes: int, pretrained: bool) -> nn.Sequential:
    """Standardisation by the model's own mean and std, most often ImageNet's, and the model."""
    arguments = {"pretrained": pretrained, "num_classes": classes}
    try:
        net = timm.create_model(args.model, img_size=args.size, **arguments)
    except TypeError:  # the model takes any size
        net = timm.create_model(args.model, **arguments)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"--model {args.model}: {error}")
    config = timm.data.resolve_model_data_config(net)
    return nn.Sequential(nets.Standardise(config["mean"], config["std"]), net)


def factor(schedule: str, update: int, total: int, warmup: int) -> float:
    """The learning rate over its peak; "step" divides it by 10 after each third, as after 30 and 60 of 90 passes."""
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "step":
        return 0.1 ** (3 * update // total)
    return (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2


def begin_with(net: nn.Module, args: argparse.Namespace) -> None:
    """Take over the weights in a file."""
    if not args.init.is_file():
        sys.exit(f"--init {args.init}: there is no such file; it is the weights.pt of a run")
    try:
        load_checkpoint(net, str(args.init))
    except (KeyError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [""])[-1].strip()
        sys.exit(f"--init {args.init} does not fit --model {args.model}: {reason}")


class Training:
    """A model in training and what it has come to."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        where = args.data, args.val, args.images
        self.data = images.Images(*where, args.size, args.resize or args.size * 256 // 224)
        self.data.demand(self.ranks * max(1, args.workers))
        self.batch = args.batch_size * self.ranks
        if args.dry_run:
            self.data.count = min(len(self.data), 2 * self.batch)
        count, self.classes = len(self.data), len(self.data.val.classes)
        if args.autoattack:
            demand_autoattack("--autoattack", self.classes)
        self.per_pass = count // self.batch  # updates
        self.total, self.changes = methods.plan(args, args.passes * self.per_pass)
        if not self.per_pass:
            sys.exit(
                f"--batch-size {args.batch_size} on each of {self.ranks} ranks needs {self.batch} images, "
                f"and --data has {count}: take a smaller one"
            )
        if args.passes <= args.warmup:
            sys.exit(f"--passes {args.passes} must be more than --warmup {args.warmup:g}")
        self.update, self.seconds, self.history = 0, 0.0, []
        self.curve: list[dict[str, float]] = []  # a row for each pass
        self.losses = torch.zeros((), device=device)  # since the last row
        self.short = {2: 2 * self.ranks} if args.dry_run else {}  # for every evaluation

        torch.manual_seed(args.seed)
        self.net = net = build(args, self.classes, args.pretrained)
        if args.init:
            begin_with(net[1], args)
        # FSDP takes contiguous weights only; convolutions follow the layout of the images as well.
        net.to(device, memory_format=torch.contiguous_format if args.fsdp else self.layout)
        self.ema = None
        if args.ema:
            self.ema = AveragedModel(net, multi_avg_fn=self.average, use_buffers=True)
        if args.fsdp:
            for module in (net, self.ema.module) if self.ema else (net,):
                jobs.shard(module, device)
        if args.compile:
            net.compile()
        on = args.amp == "bf16"
        self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=on)
        self.model: nn.Module = net
        if self.ranks > 1 and not args.fsdp:
            self.model = DistributedDataParallel(net)
            with self.autocast():
                x = torch.zeros(args.batch_size, 3, args.size, args.size, device=device)
                jobs.rehearse(self.model, x.to(memory_format=self.layout))
        settings = {"lr": args.lr, "weight_decay": args.weight_decay}
        if args.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(net.parameters(), momentum=args.momentum, **settings)
        else:
            self.optimizer = torch.optim.AdamW(net.parameters(), **settings)
        self.threat = ThreatModel(args.eps)
        names = "eps", "replays", "window", "step_size", "start", "ascents", "noise"
        self.free = FreeAdversarial(
            objective=lambda batch: self.loss(*batch),
            **{name: getattr(args, name) for name in names},
        )
        # Each rank has dropout, starts and noise of its own.
        torch.manual_seed(images.seed_of(args.seed, self.rank))

        self.facts = {"images": count, "classes": self.classes, "ranks": self.ranks}
        matter = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
        matter |= {**self.facts, "init": args.init and str(args.init)}
        if self.data.shards:  # a shard has one reader
            matter["workers"] = max(1, args.workers)
        self.checkpoint = jobs.Checkpoint(args.out, matter, net, self.optimizer, self.ema)
        way = "FSDP" if args.fsdp else "DDP" if self.ranks > 1 else "one process"
        say(
            f"{args.model}, {args.method}, eps {255 * args.eps:g}/255, {args.passes} passes over {count} images of "
            f"{self.classes} classes: {self.total} updates of {self.batch}; {self.ranks} x {device.type}, {way}"
        )

    def average(self, averaged: list[Tensor], current: list[Tensor], n: Tensor) -> None:
        """Move the average; its decay is warmed up, and n is known without a look at the GPU."""
        decay = min(self.args.ema, (1 + self.update) / (10 + self.update))
        pieces = (
            [getattr(t, "to_local", lambda t=t: t)() for t in ts] for ts in (averaged, current)
        )
        get_ema_multi_avg_fn(decay)(*pieces, n)

    def save(self) -> None:
        start = time.perf_counter()
        progress = {"update": self.update, "seconds": self.seconds, "history": self.history}
        progress |= {"curve": self.curve, "losses": self.losses.item()}
        own = {"free": self.free.state_dict()}
        self.checkpoint.save(progress, own)
        say(f"saved update {self.update} in {time.perf_counter() - start:.1f} s")

    def resume(self) -> None:
        if state := self.checkpoint.load(self.device):
            progress, own = state
            self.update, self.seconds = progress["update"], progress["seconds"]
            self.history, self.curve = progress["history"], progress["curve"]
            self.losses += progress["losses"]
            self.free.load_state_dict(own["free"])
            say(f"goes on from update {self.update} of {self.total}, {self.checkpoint.last}")

    def load(self, **what: Any) -> images.Feed:
        loader = DataLoader(
            **what,
            num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
            # A worker that is forked while another thread holds a lock may never answer: say so, do not hang.
            timeout=600 if self.args.workers else 0,
            worker_init_fn=images.ignore_signals,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        return images.Feed(loader, self.device, self.layout)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The training loss, which the ascents climb as well."""
        with self.autocast():
            output = self.model(x).float()
        return functional.cross_entropy(output, y, label_smoothing=self.args.label_smoothing)

    def train(self) -> None:
        """Make the updates that are left, or those before Ctrl-C or SIGTERM, after which the process ends."""
        # torchrun hands Ctrl-C on to ranks that have had it from the terminal.
        with Interrupts(signal.SIGTERM, signal.SIGINT, at_once=self.ranks == 1) as stop:
            self.to_the_end(stop)

    def to_the_end(self, stop: Interrupts) -> None:
        """Make the updates that are left, and log, evaluate and save on the way."""
        args = self.args
        each = methods.updates_per_batch(args.method, args.replays)
        first, end = -(-self.update // each), -(-self.total // each)  # from the batch not yet taken
        own = self.rank, self.ranks, args.seed
        plan = images.Plan(args.batch_size, self.per_pass, first, end, *own)
        feed = self.load(**self.data.training(plan))
        peak, warmup = args.lr * self.batch / 256, round(args.warmup / args.passes * self.total)
        between = args.eval_every * self.per_pass
        saved = mark = time.perf_counter()
        lap = self.update, self.seconds, 0.0
        losses = torch.zeros((), device=self.device)
        self.model.train()
        methods.change(self.free, self.changes.get(self.update, {}))
        settings = self.free, self.net, self.autocast
        for x, y in methods.batches(args.method, feed, *settings):
            rate = peak * factor(args.schedule, self.update, self.total, warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self.loss(x, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.update += 1
            methods.change(self.free, self.changes.get(self.update, {}))
            if self.ema:
                self.ema.update_parameters(self.net)
            losses += loss.detach()
            self.losses += loss.detach()

            done = self.update == self.total
            log = done or self.update % args.log_every == 0
            row = done or self.update % self.per_pass == 0
            look = between and self.update % between == 0 and not done
            late = done or time.perf_counter() - saved > args.save_every
            late = late or (args.save_updates and self.update % args.save_updates == 0)
            # All ranks save and stop after the same update, whichever wants to.
            vote = jobs.agree(stop.wanted or int(late))
            if not (log or row or look or vote):
                continue
            if jobs.agree(not math.isfinite(losses)):
                sys.exit(f"update {self.update}: the loss is not finite; see --lr and --warmup")
            self.seconds += time.perf_counter() - mark
            if log:
                updates, seconds = self.update - lap[0], self.seconds - lap[1]
                left = timedelta(seconds=round((self.total - self.update) * seconds / updates))
                say(
                    f"update {self.update}/{self.total}  lr {rate:.4g}  loss {losses / updates:.4f}  "
                    f"{updates * self.batch / seconds:.0f} images/s  "
                    f"waiting for the loader {(feed.waited - lap[2]) / seconds:.0%}  ETA {left}"
                )
                lap = self.update, self.seconds, feed.waited
                losses.zero_()
            if row:
                since = self.update - (self.curve[-1]["update"] if self.curve else 0)
                loss = self.losses.item() / since
                self.curve.append({"update": self.update, "lr": rate, "loss": loss})
                self.losses.zero_()
            if look:
                self.history += self.evaluate(self.short or {10: args.eval_images})
            if vote:
                self.save()
                saved = time.perf_counter()
            if vote > 1:
                kind = "Ctrl-C" if vote == signal.SIGINT else signal.Signals(vote).name
                place = f"update {self.update} of {self.total}, {self.checkpoint.last}"
                say(f"{kind}: stops here; the same command goes on from {place}")
                sys.exit(128 + vote)
            if done:
                break
            mark = time.perf_counter()

    def plain(self) -> nn.Module:
        """A copy of the model, of its average if there is one, in one piece and the same on all ranks."""
        state = jobs.whole(self.ema.module if self.ema else self.net)
        with torch.random.fork_rng(devices=[]):
            net = build(self.args, self.classes, pretrained=False)
        if self.rank == 0:
            net.load_state_dict(state)
        net.to(self.device, memory_format=self.layout)
        for tensor in net.state_dict().values():
            distributed.broadcast(tensor, 0)
        return net

    def evaluate(self, plan: dict[int | str, int]) -> list[dict[str, Any]]:
        """Accuracies by attack, the steps of PGD or "autoattack", each on so many images of a fixed order."""
        net, found = self.plain(), []
        val, generator = self.data.val, torch.Generator().manual_seed(0)
        order = torch.randperm(len(val), generator=generator).tolist()
        for name, count in plan.items():
            how: dict[str, Any] = {"attack": name}
            if isinstance(name, int):
                how = {"steps": name, "restarts": 1, "step_size": self.threat.eps / 4}
            share = Subset(val, order[:count][self.rank :: self.ranks])
            feed = self.load(dataset=share, batch_size=self.args.batch_size)
            result = evaluate(net, feed, self.threat, **how, sharded=True)
            say(f"update {self.update}  {result}")
            how |= {"attack": result.attack, "update": self.update}
            how |= {"norm": self.threat.norm, "eps": self.threat.eps, "images": result.count}
            found.append({**how, "clean": result.clean, "robust": result.robust})
        return found


def parse() -> argparse.Namespace:
    line = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(description=line, formatter_class=Help)
    add, whole, count = parser.add_argument, at_least(1), at_least(0)
    add("--data", required=True, help="folder with train/ and val/, or shards 'train-{00..99}.tar'")
    add("--val", help="folder of classes to evaluate on (default: val/ in --data)")
    add("--images", type=whole, help="number of training images, with shards")
    add("--out", type=Path, required=True, help="folder for checkpoints and result.json")
    add("--dry-run", action="store_true", help="a few updates on a few images, to see that it runs")
    add("--model", default="resnet50", help="any name of timm's")
    add("--pretrained", action="store_true", help="begin with timm's weights")
    add("--init", type=Path, help="begin with the weights in this file")
    ways = ["natural", *methods.SETTINGS]
    add("--method", default="free", choices=ways, help="how to train")
    methods.add_arguments(parser, 4, "4/255")
    add("--passes", type=whole, default=90, help="natural passes over the data: the cost")
    add("--batch-size", type=whole, default=256, help="of each rank")
    add("--lr", type=float, default=0.1, help="peak for 256 images an update, scaled linearly")
    add("--optimizer", default="sgd", choices=["sgd", "adamw"], help="that of the weights")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=1e-4, help="on all weights")
    add("--schedule", default="cosine", choices=["cosine", "step"], help="of --lr after the warmup")
    add("--warmup", type=float, default=5, help="passes in which the learning rate rises linearly")
    add("--label-smoothing", type=float, default=0.0, help="of the training loss")
    add("--ema", type=float, default=0.0, help="decay of the averaged weights; 0 for none")
    add("--size", type=whole, default=224, help="pixels a side")
    crop = "shorter side before the centre crop (default: size * 256 // 224)"
    add("--resize", type=whole, help=crop)
    add("--amp", default="none", choices=["none", "bf16"], help="autocast of the training")
    add("--channels-last", action="store_true", help="memory layout of weights and images")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--fsdp", action="store_true", help="shard the model over the ranks instead of copying it")
    add("--workers", type=count, default=8, help="of the loader, per rank")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and random starts")
    add("--save-every", type=float, default=600, help="seconds between checkpoints")
    add("--save-updates", type=count, default=0, help="updates between checkpoints, as well")
    add("--log-every", type=whole, default=50, help="updates between lines")
    add("--eval-every", type=count, default=10, help="passes between looks at PGD-10; 0 for none")
    add("--eval-images", type=whole, default=1000, help="for these looks")
    add("--autoattack", type=count, default=0, help="images to attack by AutoAttack at the end")
    args = parser.parse_args()
    methods.complete(args, 4)
    if args.dry_run:
        for name, most in DRY.items():
            setattr(args, name, min(getattr(args, name), most))
    return args


def run(args: argparse.Namespace, device: torch.device) -> None:
    training = Training(args, device)
    training.resume()
    if training.update < training.total:
        training.train()
    cuda = training.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else None  # without the attacks to come
    count = len(training.data.val)
    attacks: dict[int | str, int] = training.short or {10: count, 50: count}
    if args.autoattack:
        attacks["autoattack"] = min(count, args.autoattack)
    accuracies = training.evaluate(attacks)
    weights = training.plain()[1].state_dict()
    if training.rank == 0:
        record = {
            "arguments": {k: v for k, v in vars(args).items() if k not in PLACES},
            **training.facts,
            "environment": records.environment(training.device),
            "updates": training.total,
            "seconds": round(training.seconds, 1),
            "images_per_second": round(training.total * training.batch / training.seconds, 1),
            "peak_memory": peak,
            "accuracies": accuracies,
            "history": training.history,
            "curve": training.curve,
        }
        record["table"] = table(record)
        records.save(args.out / "weights.pt", weights)
        records.write(args.out / "result.json", record)
        draw(record, args.out / "curves.png")
        if not args.dry_run:
            say(
                f"wrote {args.out / 'result.json'}, curves.png and weights.pt, which has the names of timm"
            )


def draw(record: dict[str, Any], path: Path) -> None:
    """Training loss, and accuracy at the looks, which have some images each, and at the end, on all of them."""
    looks = [*record["history"], record["accuracies"][0]]
    figure, axes = plots.plt.subplots(1, 2, figsize=(9, 3.4))
    plots.learning(*axes, record["arguments"]["method"], record["curve"], looks)
    plots.save(figure, path)


def table(record: dict[str, Any]) -> list[str]:
    """The result in Markdown."""
    found = record["accuracies"]
    names = [f"{a['attack']}, {a['images']} images, %" for a in found]
    cells = [f"{100 * a['robust']:.1f}" for a in found]
    args = record["arguments"]
    label = args["method"]
    if label == "free" or (label in methods.SETTINGS and args["replays"] > 1):
        label += f", m={args['replays']}, W={args['window']}"
    for share, *changes in args["later"]:
        label += f", from {share} on {' '.join(changes)}"
    cells = [label, f"{record['seconds']:.0f}", *cells]
    cells.insert(2, f"{100 * found[0]['clean']:.1f}")
    head = " | ".join(["method", "seconds", "clean %", *names])
    return [f"| {head} |", "| --- " * len(cells) + "|", f"| {' | '.join(cells)} |"]


@contextlib.contextmanager
def folder(args: argparse.Namespace) -> Iterator[None]:
    """Make `--out`; in a dry run take a folder in it instead, and leave nothing of that."""
    first, out, made = distributed.get_rank() == 0, args.out, not args.out.exists()
    if args.dry_run:
        args.out = out / "dry-run"
        if first:
            shutil.rmtree(args.out, ignore_errors=True)  # left by a kill
        jobs.agree(0)  # it is gone
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out {args.out} cannot be made: {error.strerror}")
    try:
        yield
    finally:
        if args.dry_run and first:
            shutil.rmtree(out if made else args.out)
    if args.dry_run:
        say("dry run: it went to its end, without AutoAttack, and nothing of it is kept")


def where(out: Path) -> str:
    """From where the same command would go on."""
    last = out / "last.pt"
    if not last.exists():
        return "nothing was saved yet, and the same command starts anew"
    return (
        f"the same command goes on from update {records.load(last)['progress']['update']}, {last}"
    )


def main() -> None:
    args = parse()
    device = jobs.join()
    try:
        with folder(args):
            run(args, device)
    except KeyboardInterrupt:
        say(f"Ctrl-C: stopped at once: {where(args.out)}")
        sys.exit(128 + signal.SIGINT)
    except SystemExit:  # of all ranks alike; on an error of one, the others could not follow
        distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
