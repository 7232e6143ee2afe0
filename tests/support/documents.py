"""The code blocks of documents that people work by, and a small world in which each can run.

`tests/data/documents/` holds the blocks as they are; what is changed is the import alone. A block is a fragment:
what it takes for granted (a model, a loader, a run) is in its namespace, small.
"""

from __future__ import annotations

import types
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import sidestep
from sidestep.logger import Runner, UnifiedLogger, WandbConfig, WandbLogger, to_python_types

FOLDER = Path(__file__).parents[1] / "data" / "documents"
IMPORTS = (
    ("import wandb\n", "import sidestep as wandb\n"),
    ("from src.core.logging import", "from sidestep.logger import"),
)


def blocks(document: str) -> list[str]:
    """The code blocks of a document, with the imports changed."""
    found = [part.partition("\n")[2] for part in (FOLDER / f"{document}.txt").read_text().split("# %% ")[1:]]
    for theirs, ours in IMPORTS:
        found = [block.replace(theirs, ours) for block in found]
    return found


def world(folder: Path, run: Any, *, runner: bool, logger: bool) -> dict[str, Any]:
    """What blocks take for granted. `folder` is where they stand."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.rand(2, 4), torch.tensor([1, 2])) for _ in range(2)]
    _files(folder)
    picture = Image.new("RGB", (8, 8), "red")
    names: dict[str, Any] = {
        "wandb": sidestep, "run": run, "torch": torch, "np": np, "to_python_types": to_python_types,
        "model": model, "optimizer": optimizer, "criterion": torch.nn.CrossEntropyLoss(),
        "config": types.SimpleNamespace(epochs=2), "epochs": 2, "num_epochs": 2, "epoch": 1, "step": 10,
        "global_step": 100, "log_interval": 1, "train_loader": batches, "val_loader": batches,
        "dataloader": batches,
        "loss": 0.5, "loss_value": 0.5, "acc_value": 0.9, "losses": [0.5, 0.4], "final_loss": 0.1,
        "current_lr": 0.1,
        "train_loss": 0.5, "train_acc": 0.8, "val_loss": 0.6, "val_acc": 0.7, "gpu_mem": 1.0,
        "final_accuracy": 0.9, "spatial_iou": 0.8, "lpips": 0.2, "sub_exp_index": 2, "model_config": {"d": 4},
        "training_metrics": {"loss": 0.5}, "x_values": [1, 2], "y_values": [3, 4], "labels": ["a", "b"],
        "values": [1.0, 2.0, 2.5], "img": picture, "img1": picture, "img2": picture, "img3": picture,
        "images": [picture, picture], "predictions": [1, 2], "targets": [1, 3], "generated_image": picture,
        "seen_val_loader": batches, "unseen_val_loader": batches, "out_of_distribution_loader": batches,
        "train_epoch": lambda *_: 0.5, "train_step": lambda *_: torch.rand(4, requires_grad=True).sum(),
        "train_one_epoch": lambda: 0.5, "train_batch": lambda *_: 0.5, "train": lambda *_: 0.5,
        "evaluate": lambda *_: (0.9, 0.4), "validate": lambda *_: (0.6, 0.7),
        "generate_sample": lambda: picture, "generate_image": lambda _: picture, "process": lambda _: None,
        "compute_metric_a": float, "compute_metric_b": float, "MyModel": lambda: model, "ConvNet": lambda: model,
        "batch": batches[0], "nn": torch.nn,
    }  # fmt: skip
    if runner:
        names["runner"] = Runner(run)
    if logger:
        names["wandb_logger"] = WandbLogger(WandbConfig(), logger=UnifiedLogger())
    return names


class _Net(torch.nn.Linear):
    """A model whose loss is its output, as one document has it."""

    def forward(self, batch: Any) -> Any:
        return super().forward(batch[0] if isinstance(batch, tuple) else batch).mean()


def _two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    weight, bias = model.parameters()
    return torch.optim.SGD([{"params": [weight]}, {"params": [bias], "lr": 0.01}], lr=0.1)


OTHERWISE: dict[tuple[str, int], Any] = {
    ("pytorch-manual", 6): lambda names: {"optimizer": _two_groups(names["model"])},
    ("pytorch-manual", 7): lambda names: {"model": _Net(4, 1)},
    ("wandb-basics", 3): lambda names: {"config": {"epochs": 2}},
    ("wandb-basics", 16): lambda names: {"validate": lambda: {"loss": 0.6, "acc": 0.7}},
}
"""What means something else in one block than in the others."""


def _files(folder: Path) -> None:
    Image.new("RGB", (8, 8), "blue").save(folder / "sample.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "example.png")
    with wave.open(str(folder / "example.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    (folder / "large_file.pt").write_bytes(b"weights")
    (folder / "example.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(64))
    (folder / "checkpoints").mkdir(exist_ok=True)
    for name in ("model", *(f"step_{step}" for step in (0, 50, 1000))):
        (folder / "checkpoints" / f"{name}.pt").write_bytes(b"weights")
