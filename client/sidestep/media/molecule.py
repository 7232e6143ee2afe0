"""Molecules: files of a format that describes them.

What only rdkit can make a molecule of is refused: write it as a file there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sidestep.errors import UnsupportedValue
from sidestep.media.audio import file_of
from sidestep.media.base import Files
from sidestep.media.object3d import whole
from sidestep.media.value import Content, Value, given, text_or_none

FILE_TYPES = ("pdb", "pqr", "mmcif", "mcif", "cif", "sdf", "sd", "gro", "mol2", "mmtf")


class Molecule(Value):
    """A molecule: a path, or a file object with `file_type`."""

    kind: ClassVar[str] = "molecule"

    __slots__ = ()

    def __init__(self, data_or_path: Any, caption: str | None = None, **keywords: Any) -> None:
        super().__init__(
            lambda: _content(data_or_path, keywords.get("file_type")) | given(caption=text_or_none(caption))
        )

    @classmethod
    def from_rdkit(cls, data_or_path: Any, *args: Any, **keywords: Any) -> Molecule:  # noqa: ARG003 - wandb's
        """Refused when it is logged."""
        return cls(_Refused("a molecule of rdkit's"))

    @classmethod
    def from_smiles(cls, data: str, *args: Any, **keywords: Any) -> Molecule:  # noqa: ARG003 - wandb's
        """Refused when it is logged."""
        return cls(_Refused("a molecule in SMILES"))


class _Refused:
    """What is to be written as a file first."""

    def __init__(self, what: str) -> None:
        self.what = what


def _content(data: Any, file_type: Any) -> dict[str, Any]:
    if isinstance(data, _Refused):
        raise UnsupportedValue(
            f"{data.what} is not computed here: write it with rdkit.Chem.MolToPDBFile and log the file"
        )
    if isinstance(name := getattr(data, "name", None), str) and hasattr(data, "read"):
        data = name
    if isinstance(data, str | os.PathLike):
        kind = Path(data).suffix[1:]
        if kind not in FILE_TYPES:
            raise UnsupportedValue(
                f"{os.fsdecode(data)!r:.200} is no molecule: it may end in {', '.join(FILE_TYPES)}"
            )
        return {"file": Content(path=os.fsdecode(data)), "suffix": f".{kind}"}
    if not hasattr(data, "read"):
        raise UnsupportedValue(f"a molecule is a path or a file object, not a {type(data).__name__}")
    if file_type not in FILE_TYPES:
        raise UnsupportedValue(
            f"file_type={file_type!r:.40}: of a file object it is needed: {', '.join(FILE_TYPES)}"
        )
    return {"file": Content(whole(data)), "suffix": f".{file_type}"}


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A `wandb.Molecule` of a file."""
    import wandb

    return wandb.Molecule(str(file_of(facts, files)), caption=facts.get("caption"))
