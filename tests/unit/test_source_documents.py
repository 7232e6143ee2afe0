"""Documents that people work by: each code block, with only its import changed, logs what it says it logs."""

from __future__ import annotations

from pathlib import Path

import pytest

import sidestep
from sidestep.testing import record
from tests.support.documents import OTHERWISE, blocks, world

DOCUMENTS = ("best-practices", "wandb-logger", "pytorch-manual", "wandb-basics", "single-run")
CAN_NOT = {
    ("single-run", 2): "no Python: `# ...` stands for a statement's end in it",
}
LOGGED: dict[tuple[str, int], str] = {
    ("best-practices", 0): "e_p2_1/accuracy e_p2_1/loss e_p2_1/progress",
    ("best-practices", 1): "",
    ("best-practices", 2): "",
    ("best-practices", 3): "e_p2_1/final_accuracy e_p2_1/final_loss e_p2_1/lpips e_p2_1/spatial_iou",
    ("best-practices", 4): "loss",
    ("best-practices", 5): "loss",
    ("best-practices", 6): "e_p2_1/epoch e_p2_1/loss define:e_p2_1/*",
    ("best-practices", 7): "summary:results/loss_plot.png artifact:loss_plot.png",
    ("best-practices", 8): "summary:results/results.json artifact:results.json",
    ("best-practices", 9): "summary:results/model_checkpoint.pt artifact:model_checkpoint.pt",
    ("best-practices", 10): "loss",
    ("best-practices", 11): "artifact:large-data",
    ("wandb-logger", 0): "accuracy loss samples/images summary:models/checkpoint-model artifact:checkpoint-model",
    ("wandb-logger", 1): "",
    ("wandb-logger", 2): "accuracy/train accuracy/val learning_rate loss/train loss/val",
    ("wandb-logger", 3): "generated/images samples/images",
    ("wandb-logger", 4): (
        "summary:models/checkpoint-model summary:models/checkpoint-step_1000 "
        "artifact:checkpoint-model artifact:checkpoint-step_1000"
    ),
    ("wandb-logger", 5): "config:data config:model config:training",
    ("wandb-logger", 6): (
        "accuracy loss samples/images summary:models/checkpoint-step_0 summary:models/checkpoint-step_50 "
        "artifact:checkpoint-step_0 artifact:checkpoint-step_50"
    ),
    ("pytorch-manual", 0): (
        "batch epoch loss config:architecture config:batch_size config:epochs config:learning_rate"
    ),
    ("pytorch-manual", 1): "loss",
    ("pytorch-manual", 2): "loss",
    ("pytorch-manual", 3): "epoch epoch_loss",
    ("pytorch-manual", 4): "",
    ("pytorch-manual", 5): "epoch learning_rate",
    ("pytorch-manual", 6): "epoch lr_backbone lr_classifier",
    ("pytorch-manual", 7): "grad_clipped grad_norm_after_clip grad_norm_before_clip",
    ("pytorch-manual", 8): "",
    ("pytorch-manual", 9): "",
    ("pytorch-manual", 10): "accuracy_class_1 accuracy_class_2 val_step",
    ("pytorch-manual", 11): "batch_loss epoch",
    ("pytorch-manual", 12): (
        "epoch val_ood/accuracy val_ood/loss val_seen/accuracy val_seen/loss val_unseen/accuracy val_unseen/loss"
    ),
    ("pytorch-manual", 13): "cpu_percent loss memory_percent memory_used_gb",
    ("pytorch-manual", 14): "custom_bar_chart custom_histogram custom_line_plot custom_scatter",
    ("pytorch-manual", 15): "example random_image tensor_image",
    ("pytorch-manual", 16): "examples",
    ("pytorch-manual", 17): "",
    ("pytorch-manual", 18): "segmentation",
    ("pytorch-manual", 19): "predictions_table",
    ("pytorch-manual", 20): "validation_results",
    ("pytorch-manual", 21): "metrics_table",
    ("pytorch-manual", 22): "audio_file audio_sample",
    ("pytorch-manual", 23): "video video_file",
    ("wandb-basics", 0): "",
    ("wandb-basics", 1): "",
    ("wandb-basics", 2): "config:batch_size config:epochs config:learning_rate",
    ("wandb-basics", 3): "accuracy epoch loss",
    ("wandb-basics", 4): "accuracy loss config:epochs config:lr",
    ("wandb-basics", 5): "",
    ("wandb-basics", 6): "",
    ("wandb-basics", 7): "config:architecture config:dataset config:dropout config:epochs config:learning_rate",
    ("wandb-basics", 8): "accuracy loss step",
    ("wandb-basics", 9): "val_accuracy summary:best_accuracy summary:final_loss",
    ("wandb-basics", 10): "",
    ("wandb-basics", 11): (
        "epoch train/batch train/epoch train/loss val/accuracy val/loss config:batch_size "
        "config:epochs config:learning_rate"
    ),
    ("wandb-basics", 12): "lr train/accuracy train/loss val/accuracy val/loss",
    ("wandb-basics", 13): "loss",
    ("wandb-basics", 14): "loss",
    ("wandb-basics", 15): "train_acc train_loss val_loss",
    ("wandb-basics", 16): "epoch train/loss val/accuracy val/loss",
    ("wandb-basics", 17): "loss",
    ("wandb-basics", 18): "config:epochs",
    ("wandb-basics", 19): "config:batch_size config:lr",
    ("wandb-basics", 20): "",
    ("wandb-basics", 21): "system/gpu_memory train/accuracy train/loss val/accuracy val/loss",
    ("wandb-basics", 22): "loss",
    ("wandb-basics", 23): "",
    ("single-run", 0): "",
    ("single-run", 1): "",
    ("single-run", 3): "",
    ("single-run", 4): "",
    ("single-run", 5): (
        "define:training/consistency/* define:training/consistency_distill/* "
        "define:training/consistency_distill/step define:training/diffusion/* "
        "define:training/diffusion_residual/* define:training/diffusion_residual/step "
        "define:training/operator/* define:training/operator/step define:training/steady/* "
        "define:training/steady_prior/* define:training/steady_prior/step"
    ),
    ("single-run", 6): "define:training/operator/*",
    ("single-run", 7): "define:training/operator/*",
}
"""What each has in the run in the end: metrics, and what it put into configuration, summary and definitions."""


def test_every_block_is_looked_at():
    there = {(document, number) for document in DOCUMENTS for number in range(len(blocks(document)))}

    assert there == LOGGED.keys() | CAN_NOT.keys()
    assert set() == LOGGED.keys() & CAN_NOT.keys()


@pytest.mark.parametrize(("document", "number"), LOGGED)
def test_a_block_logs_what_it_says(document: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(document)[number]
    begins = "wandb.init(" in code or "WandbLogger(" in code

    with record(strict=False) as logged:
        run = None if begins else sidestep.init()
        names = world(
            tmp_path, run, runner="runner" in code, logger="wandb_logger" in code and "WandbLogger(" not in code
        )
        names |= OTHERWISE.get((document, number), lambda _: {})(names)
        exec(compile(code, f"{document}[{number}]", "exec"), names)
        sidestep.finish()

    said = [
        *logged.names,
        *(f"config:{name}" for name in sorted(logged.config)),
        *(f"summary:{name}" for name in sorted(logged.summary)),
        *(f"define:{name}" for name in sorted(logged.definitions)),
        *(f"artifact:{it['name']}" for it in logged.artifacts),
    ]
    assert LOGGED[document, number].split() == said
