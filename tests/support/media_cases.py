"""One call for each form of each kind of media, to be made with `sidestep` and with `wandb` alike.

`values(m, ...)` makes all with the module `m`, so that two runs can be compared name by name. The process that
packs has loaded what a training has: numpy, PIL, matplotlib, pandas, plotly, but neither wandb nor the daemon.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot
import numpy as np
import pandas as pd
from PIL import Image as Pillow

mpl.use("Agg")

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (12, 10, 4), dtype=np.uint8)
GRAY = PIXELS[..., 0]
MASK = (np.arange(120).reshape(12, 10) % 5).astype(np.uint8)
PERSON = {0: "none", 1: "person", 2: "car", 3: "road", 4: "sky"}
POINTS = RNG.uniform(-1, 1, (20, 3))
NUMBERS = RNG.normal(size=1000)
PROBABILITIES = RNG.dirichlet(np.ones(3), 200).round(2)
TRUE = RNG.integers(0, 3, 200)
NAMES = ["cat", "dog", "bird"]
GROWING = "table/growing"
PDB = "HEADER    WATER\nATOM      1  O   HOH A   1       0.000   0.000   0.000  1.00  0.00           O\nEND\n"

BOXES = {
    "predictions": {
        "box_data": [
            {
                "position": {"minX": 0.1, "maxX": 0.2, "minY": 0.3, "maxY": 0.4},
                "class_id": 1,
                "box_caption": "a person",
                "scores": {"acc": 0.5, "loss": 1},
            },
            {"position": {"middle": [5, 6], "width": 2, "height": 3}, "domain": "pixel", "class_id": 2},
        ],
        "class_labels": PERSON,
    },
    "unnamed": {"box_data": [{"position": {"middle": [0.5, 0.5], "width": 0.1, "height": 0.1}, "class_id": 4}]},
}


def palette() -> Any:
    """An image of indexed colours."""
    return Pillow.fromarray(PIXELS).quantize(16)


def figure() -> Any:
    """A figure that is drawn the same each time."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(2, 1.5))
    made.subplots().plot([1, 3, 2])
    return made


def plotly_figure() -> Any:
    """A figure with a numpy array in it."""
    import plotly.graph_objects as graphs

    return graphs.Figure(graphs.Scatter(x=[1, 2, 3], y=np.array([4.0, 5.5, 6.0]), name="line"))


def images(m: Any, folder: Path) -> dict[str, Any]:
    """All ways to make an image that wandb gets right."""
    jpeg = folder / "picture.jpg"
    Pillow.fromarray(PIXELS).save(jpeg)
    return {
        "image/rgb": m.Image(PIXELS, caption="an image"),
        "image/rgba": m.Image(ALPHA),
        "image/gray": m.Image(GRAY),
        "image/one_channel": m.Image(GRAY[..., None]),
        "image/not_contiguous": m.Image(PIXELS[::2, ::-1]),
        "image/floats_to_255": m.Image(PIXELS.astype(np.float32)),
        "image/whole_numbers": m.Image(PIXELS.astype(np.int64)),
        "image/pil": m.Image(Pillow.fromarray(PIXELS)),
        "image/pil_alpha": m.Image(Pillow.fromarray(ALPHA)),
        "image/pil_palette": m.Image(palette()),
        "image/pil_one_bit": m.Image(Pillow.fromarray(GRAY).convert("1")),
        "image/path": m.Image(str(jpeg), caption="of a file"),
        "image/pathlib": m.Image(jpeg),
        "image/mode": m.Image(PIXELS, mode="L"),
        "image/jpg": m.Image(PIXELS, file_type="jpg"),
        "image/of_an_image": m.Image(m.Image(PIXELS, caption="once"), grouping=2),
        "image/figure": m.Image(figure()),
        "image/boxes": m.Image(PIXELS, boxes=BOXES),
        "image/masks": m.Image(
            PIXELS,
            masks={"truth": {"mask_data": MASK, "class_labels": PERSON}, "guess": {"mask_data": MASK.T.T + 1}},
            classes=[{"id": 9, "name": "nine"}],
        ),
        "image/list": [m.Image(PIXELS, caption="first"), m.Image(PIXELS[::-1], caption="second")],
        "image/boxes_in_a_list": [m.Image(PIXELS, boxes=BOXES), m.Image(PIXELS)],
    }


def tables(m: Any, folder: Path) -> dict[str, Any]:
    """Tables, and all that may be in them."""
    frame = pd.DataFrame({"n": [1, 2], "x": [0.5, float("nan")], "word": ["a", "b"]})
    frame["when"] = pd.to_datetime(["2024-01-02 03:04:05", "2025-06-07 00:00:00"])
    by_row = m.Table(columns=["name", "score", "ok", "note"])
    by_row.add_data("a", 1.5, True, None)
    by_row.add_data("ü", 2, False, "text")
    with_media = m.Table(columns=["image", "sound", "embedding", "several", "word"])
    for at in range(3):
        with_media.add_data(
            m.Image(PIXELS + at, caption=f"image {at}"),
            m.Html(f"<p>{at}</p>"),
            np.arange(4, dtype=np.float32) + at,
            [1, 2, at],
            f"word {at}",
        )
    return {
        "table/data": m.Table(columns=["a", "b"], data=[[1, "x"], [2, "y"]]),
        "table/default": m.Table(data=[["in", "out", "wanted"]]),
        "table/array": m.Table(columns=["x", "y", "z"], data=POINTS[:4]),
        "table/frame": m.Table(dataframe=frame),
        "table/implied": frame,
        "table/by_row": by_row,
        "table/media": with_media,
    }


def others(m: Any, folder: Path) -> dict[str, Any]:
    """Everything else that a file comes of."""
    for name, content in {
        "page.html": "<html><b>file</b></html>",
        "water.pdb": PDB,
        "cube.obj": "v 0 0 0\n",
    }.items():
        (folder / name).write_text(content)
    (folder / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42 not a real one")
    (folder / "sound.wav").write_bytes(b"RIFF not a real one")
    scene = {"points": POINTS, "boxes": np.array([]), "vectors": np.array([])}
    return {
        "histogram/numbers": m.Histogram(NUMBERS),
        "histogram/list": m.Histogram([1, 2, 2, 3.5], num_bins=4),
        "histogram/whole": m.Histogram(np.arange(100, dtype=np.int32), num_bins=10),
        "histogram/counted": m.Histogram(np_histogram=np.histogram(NUMBERS, bins=20)),
        "audio/path": m.Audio(str(folder / "sound.wav"), sample_rate=8000, caption="a sound"),
        "video/path": m.Video(str(folder / "clip.mp4"), caption="a clip"),
        "video/bytes": m.Video(io.BytesIO(b"GIF89a not a real one"), format="gif"),
        "html/text": m.Html("<p>ünïcode</p>"),
        "html/head": m.Html("<html><head><title>t</title></head><body>b</body></html>"),
        "html/plain": m.Html("<p>as it is</p>", inject=False),
        "html/path": m.Html(str(folder / "page.html")),
        "html/stream": m.Html(io.StringIO("<i>stream</i>")),
        "object3d/points": m.Object3D(POINTS, caption="points"),
        "object3d/colours": m.Object3D(np.hstack([POINTS, np.full((20, 3), 7)])),
        "object3d/scene": m.Object3D({"type": "lidar/beta", **scene}),
        "object3d/cloud": m.Object3D.from_point_cloud(
            points=[(0, 0, 0), (1, 1, 1)],
            boxes=[
                m.box3d(center=(0, 0, 0), size=(1, 2, 3), orientation=(1, 0, 0, 0), color=(1, 0, 0), label="box")
            ],
        ),
        "object3d/path": m.Object3D(str(folder / "cube.obj")),
        "molecule/path": m.Molecule(str(folder / "water.pdb"), caption="water"),
        "molecule/stream": m.Molecule(io.StringIO(PDB), file_type="pdb"),
        "plotly/figure": m.Plotly(plotly_figure()),
        "plotly/itself": plotly_figure(),
        "list/arrays": (NUMBERS, np.arange(40.0).reshape(40, 1), np.arange(3), [NUMBERS, 2.5], {"deep": NUMBERS}),
        "list/histograms": [m.Histogram(NUMBERS), m.Histogram([1, 2, 2, 3.5])],
        "list/html": [m.Html("<p>1</p>"), m.Html("<p>2</p>")],
        "list/mixed": [m.Image(PIXELS), m.Html("<p>2</p>")],
        "nested": {"deeper": {"image": m.Image(GRAY, caption="deep")}, "number": 3},
    }


def charts(m: Any, folder: Path) -> dict[str, Any]:
    """Everything of `plot`."""
    rows = [[x, x * x, "ab"[x % 2]] for x in range(6)]

    def table() -> Any:
        return m.Table(columns=["x", "y", "s"], data=rows)

    return {
        "plot/line": m.plot.line(table(), "x", "y", stroke="s", title="a line"),
        "plot/scatter": m.plot.scatter(table(), "x", "y"),
        "plot/bar": m.plot.bar(table(), "s", "y", title="bars"),
        "plot/histogram": m.plot.histogram(table(), "y", split_table=True),
        "plot/visualized": m.visualize("wandb/elbow/v1", table()),
        "plot/series": m.plot.line_series([0, 1, 2], [[1, 2, 3], [3, 2, 1]], keys=["up", "down"], title="t"),
        "plot/series_each": m.plot.line_series([[0, 1], [5, 6]], [[1, 2], [3, 2]]),
        "plot/confusion": m.plot.confusion_matrix(
            y_true=TRUE.tolist(), preds=PROBABILITIES.argmax(axis=1).tolist(), class_names=NAMES
        ),
        "plot/confusion_by_probability": m.plot.confusion_matrix(probs=PROBABILITIES, y_true=TRUE.tolist()),
    }


def implied() -> dict[str, Any]:
    """What becomes an image without being one; wandb refuses the first and makes another thing of the second."""
    return {"implied/pil": Pillow.fromarray(PIXELS), "implied/figure": figure()}


def growing(m: Any) -> Iterator[Any]:
    """One incremental table, each time with a row more."""
    table = m.Table(columns=["n", "word"], log_mode="INCREMENTAL")
    for at in range(3):
        table.add_data(at, f"row {at}")
        yield table


def heavy(m: Any, folder: Path) -> dict[str, Any]:
    """What takes torch, or to be compared scikit-learn: seconds to load."""
    import torch

    pixels = torch.from_numpy(PIXELS)
    return {
        "image/torch": m.Image(pixels.permute(2, 0, 1)),
        "image/torch_floats": m.Image(pixels.permute(2, 0, 1).float().requires_grad_()),
        "image/torch_gray": m.Image(torch.from_numpy(GRAY.copy())[None]),
        "image/torch_mask": m.Image(PIXELS, masks={"guess": {"mask_data": torch.from_numpy(MASK)}}),
        "histogram/torch": m.Histogram(torch.from_numpy(NUMBERS)),
        "plot/roc": m.plot.roc_curve(TRUE, PROBABILITIES, labels=NAMES),
        "plot/roc_of_one": m.plot.roc_curve(TRUE, PROBABILITIES, classes_to_plot=[1]),
        "plot/pr": m.plot.pr_curve(TRUE, PROBABILITIES, labels=NAMES, interp_size=11),
    }


def values(m: Any, folder: Path, *, with_heavy: bool) -> dict[str, Any]:
    """All of them."""
    light = images(m, folder) | tables(m, folder) | others(m, folder) | charts(m, folder)
    return light | heavy(m, folder) if with_heavy else light
