"""Free adversarial training with the Trainer of transformers: a small vision transformer, on handwritten digits.

python examples/hosts/with_trainer.py
python examples/hosts/with_trainer.py --accumulate 2
"""

import os
import tempfile

import torch
from arguments import parser
from digits import test_set, train_set
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from free_adv import FreeAdversarial, evaluate  # free-adv


class Images(Dataset):
    """Samples as the image models of transformers take them."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, label = self.data[index]
        return {"pixel_values": image, "labels": label}


class Logits(nn.Module):
    """A model of transformers as a map from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=x).logits


def main() -> None:
    options = parser(__doc__, passes=40, eps=0.1, lr=2e-3)
    options.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none")
    options.add_argument("--accumulate", type=int, default=1, help="micro-batches per update")
    args = options.parse_args()

    train, test = train_set(), test_set()
    if args.dry_run:
        args.passes, args.batch_size = 3, 8
        train, test = (Subset(data, range(12)) for data in (train, test))
    torch.manual_seed(args.seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    free = FreeAdversarial(  # free-adv: one gradient of the input before each update
        eps=args.eps,
        replays=1,
        ascents=1,
        objective=lambda batch: model(**batch).loss,
        start="zero",
        noise=2,
        accumulate=args.accumulate,
        key="pixel_values",
    )
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=free.epochs(args.passes),  # free-adv
            per_device_train_batch_size=args.batch_size // ranks // args.accumulate,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            weight_decay=0.05,
            bf16=args.amp == "bf16",
            fp16=args.amp == "fp16",
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=args.dry_run,
        )
        trainer = Trainer(model, settings, train_dataset=Images(train))
        plain = trainer.get_train_dataloader
        trainer.get_train_dataloader = lambda: free.replay(plain())  # free-adv
        trainer.train()

    result = evaluate(Logits(trainer.model), DataLoader(test, len(test)), free.threat, steps=40)
    if trainer.is_world_process_zero():
        print(f"updates={trainer.state.global_step}: {result}")


if __name__ == "__main__":
    main()
