"""Evaluate what digits_ddp.py trained, into the same run but on an axis of its own.

    sidestep run -- sh -c "torchrun --nproc-per-node 2 digits_ddp.py && python digits_eval.py"

- `run.stage("eval")` writes `eval/accuracy`, plotted against `eval/step`: the step of the checkpoint
- the training's own steps are left alone, although this process logs after it
"""

from __future__ import annotations

import torch
from digits_ddp import build_model, checkpoint_dir, load_split
from torch import Tensor, nn

import sidestep


def main() -> None:
    """Evaluate every checkpoint, oldest first, and keep the best accuracy in the summary."""
    torch.set_num_threads(1)
    images, labels = load_split("held_out")

    with sidestep.init(config={"held_out_images": len(labels)}) as run:
        evaluation = run.stage("eval")
        accuracies = []
        for path in sorted(checkpoint_dir().glob("*.pt"), key=lambda path: int(path.stem)):
            model = build_model()
            model.load_state_dict(torch.load(path, weights_only=True))

            metrics = evaluate(model, images, labels)
            evaluation.log(metrics, step=int(path.stem))
            accuracies.append(metrics["accuracy"])
        run.summary["best_accuracy"] = max(accuracies)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss, accuracy, and how many of each digit were found."""
    logits = model(images)
    right = (logits.argmax(dim=1) == labels).float()
    return {
        "loss": nn.functional.cross_entropy(logits, labels).item(),
        "accuracy": right.mean().item(),
    } | {f"recall/{digit}": right[labels == digit].mean().item() for digit in range(10)}


if __name__ == "__main__":
    main()
