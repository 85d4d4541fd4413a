"""Free adversarial training of a text classifier: a small BERT whose word embeddings are perturbed.

    python examples/hosts/with_text.py

From which package of Python's standard library do 32 words come? Text has no continuous input, so delta
is added to the output of the embedding layer, `at=`, with an l2 radius in the units of the embeddings.
"""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import torch
from arguments import fraction, parser
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from free_adv import FreeAdversarial, ThreatModel, evaluate  # free-adv

PACKAGES = ["asyncio", "email", "importlib", "multiprocessing", "unittest", "xml"]
LENGTH, WORDS = 32, 4000


def texts() -> tuple[TensorDataset, TensorDataset]:
    """Windows of 32 words and the package they are from: training texts, and every fifth file to test."""
    files = []
    for label, name in enumerate(PACKAGES):
        (folder,) = importlib.util.find_spec(name).submodule_search_locations
        paths = sorted(p for p in Path(folder).rglob("*.py") if "test" not in p.parts)
        for i, path in enumerate(paths):
            words = re.findall(r"\w+|[^\w\s]", path.read_text(encoding="utf-8").lower())
            files.append((i % 5 == 4, label, words))
    counts = Counter(word for test, _, words in files if not test for word in words)
    number = {word: i + 1 for i, (word, _) in enumerate(counts.most_common(WORDS - 1))}

    def windows(wanted: bool) -> TensorDataset:
        parts = [
            (torch.tensor([number.get(w, 0) for w in words[i : i + LENGTH]]), label)
            for test, label, words in files
            if test == wanted
            for i in range(0, len(words) - LENGTH + 1, LENGTH)
        ]
        return TensorDataset(
            torch.stack([x for x, _ in parts]), torch.tensor([y for _, y in parts])
        )

    return windows(False), windows(True)


def network() -> BertForSequenceClassification:
    """A BERT of 2 layers with random weights."""
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        num_labels=len(PACKAGES),
        initializer_range=0.1,  # 1 / sqrt(hidden_size), about
    )
    return BertForSequenceClassification(config)


class FromEmbeddings(nn.Module):
    """The classifier behind its embedding layer, so that an attack can move the embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=embedded).logits


def report(name: str, model: nn.Module, test: DataLoader, threat: ThreatModel) -> None:
    """Accuracy on the test texts, and with their embeddings attacked."""
    embed = model.get_input_embeddings()
    with torch.no_grad():
        batches = [(embed(words), labels) for words, labels in test]
    print(f"{name:<8}{evaluate(FromEmbeddings(model), batches, threat, steps=10)}")


def main() -> None:
    options = parser(__doc__, passes=12, replays=3, eps=0.3, lr=2e-3)
    options.add_argument("--step-size", type=fraction, default=0.1, help="ascent step of Free")
    args = options.parse_args()

    train, test = texts()
    generator = torch.Generator().manual_seed(0)
    test = Subset(test, torch.randperm(len(test), generator=generator)[:1000].tolist())
    if args.dry_run:
        args.passes = args.replays
        train, test = (Subset(data, range(16)) for data in (train, test))
    for method in ("natural", "free"):
        torch.manual_seed(args.seed)
        loader = DataLoader(train, args.batch_size, shuffle=True)
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), args.lr)
        free = FreeAdversarial(  # free-adv
            optimizer,
            eps=args.eps,
            step_size=args.step_size,
            norm="l2",
            replays=args.replays if method == "free" else 1,
            at=model.get_input_embeddings(),
        )
        epochs, batches = args.passes, loader
        if method == "free":
            epochs, batches = free.epochs(epochs), free.replay(loader)  # free-adv
        updates = epochs * len(batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=updates)
        model.train()
        for _ in range(epochs):
            for words, labels in batches:
                loss = model(words, labels=labels).loss
                if method == "free":
                    free.step(loss)  # free-adv
                else:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                schedule.step()
        report(method, model, DataLoader(test, 100), free.threat)


if __name__ == "__main__":
    main()
