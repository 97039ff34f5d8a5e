"""The demo's model and data: a small transformer that reads scikit-learn's handwritten digits row by row."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

TASKS = {"0-3": range(0, 4), "4-6": range(4, 7), "7-9": range(7, 10)}
"""Names of the tasks and the digits of each."""

Split = tuple[torch.Tensor, torch.Tensor]


class Classifier(nn.Module):
    """Images [n, 8, 8] -> logits [n, 10]; every row of pixels is a token."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        x = self.embed(images) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x).mean(1))
        return logits


def data() -> tuple[Split, Split]:
    """Images scaled to [0, 1] and labels, for training and for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return (images[train], labels[train]), (images[test], labels[test])


def of_task(split: Split, task: str) -> Split:
    """The part of a split whose digits belong to the task."""
    images, labels = split
    mine = torch.isin(labels, torch.tensor(list(TASKS[task])))
    return images[mine], labels[mine]


def train(model: Classifier, split: Split, *, epochs: int, rate: float, seed: int) -> Classifier:
    """AdamW on noisy images, batches of 64."""
    images, labels = split
    random = torch.Generator().manual_seed(seed)
    learn = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learn, lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=random).split(64):
            noisy = images[batch] + 0.1 * torch.randn(images[batch].shape, generator=random)
            loss = nn.functional.cross_entropy(model(noisy), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def pretrain(split: Split) -> Classifier:
    """The base: a quarter of the training images, briefly."""
    torch.manual_seed(0)
    images, labels = split
    return train(Classifier(), (images[:300], labels[:300]), epochs=12, rate=2e-3, seed=1)


def finetune(base: Classifier, split: Split, task: str, seed: int) -> Classifier:
    """An expert: the base trained on one task, its head kept so that all experts mean the same classes."""
    model = copy.deepcopy(base)
    model.head.requires_grad_(False)
    return train(model, of_task(split, task), epochs=8, rate=2e-4, seed=seed)


def accuracy(model: Classifier, split: Split) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float((model(split[0]).argmax(1) == split[1]).float().mean())


def save(model: Classifier, folder: Path) -> None:
    """Write a directory as Hugging Face's tools expect one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "digits-classifier", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> Classifier:
    """Read such a directory back."""
    model = Classifier()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model
