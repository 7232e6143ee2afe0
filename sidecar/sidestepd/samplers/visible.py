"""Which GPUs a process sees, by what CUDA_VISIBLE_DEVICES says.

- NVML knows nothing of that variable and numbers GPUs in the order of their PCI addresses; UUIDs join the two
- an entry is a number, a GPU's UUID or the beginning of one (`GPU-8a`), a MIG instance's (`MIG-...`), or one as
  drivers before 470 named it (`MIG-GPU-.../1/0`), of which only the GPU is known here; as for CUDA, the first that
  is none of these ends the list, and so does a GPU that is named twice
- numbers are taken in PCI order. CUDA's default is the fastest first, which is the same order where all GPUs of a
  machine are of one model; where they are not, a worker's torch knows the UUID and this is not asked
"""

from __future__ import annotations

from collections.abc import Sequence


def visible_devices(variable: str | None, uuids: Sequence[str]) -> list[str]:
    """The UUIDs of the devices that a process sees, in its own order. `uuids` are all there are, in PCI order.

    MIG instances may be among `uuids`; only their UUIDs name them, not numbers.
    """
    gpus = [uuid for uuid in uuids if not uuid.startswith("MIG-")]
    if variable is None:
        return gpus
    seen: list[str] = []
    for entry in (text.strip() for text in variable.split(",")):
        uuid = _device(entry, gpus, uuids)
        if uuid is None:
            break
        if uuid in seen:
            return []  # CUDA sees none at all then
        seen.append(uuid)
    return seen


def _device(entry: str, gpus: Sequence[str], uuids: Sequence[str]) -> str | None:
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if entry.startswith("MIG-GPU-"):
        entry = entry.removeprefix("MIG-").partition("/")[0]
    if not entry.startswith(("GPU-", "MIG-")) or len(entry) <= len("GPU-"):
        return None
    fitting = [uuid for uuid in uuids if uuid.lower().startswith(entry.lower())]
    return fitting[0] if len(fitting) == 1 else None  # a beginning that fits two names none


def device_number(*, ordinal: int, device: str | None, visible: str | None, gpus: dict[str, int]) -> int:
    """The number of a GPU in NVML's order, from what a worker knows of it; `gpus` maps UUIDs to numbers.

    Where nobody knows the UUIDs (no NVML here), the number in CUDA_VISIBLE_DEVICES, or the ordinal itself.
    """
    if device is not None:
        bare = _bare(device)
        for uuid, number in gpus.items():
            if _bare(uuid) == bare:
                return number
    in_order = sorted(gpus, key=lambda uuid: gpus[uuid])
    seen = visible_devices(visible, in_order)
    if ordinal < len(seen):
        return gpus[seen[ordinal]]
    entries = [text.strip() for text in visible.split(",")] if visible else []
    if ordinal < len(entries) and entries[ordinal].isdecimal():
        return int(entries[ordinal])
    return ordinal


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-")
