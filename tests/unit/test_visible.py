"""CUDA_VISIBLE_DEVICES in all its forms, and which GPU a worker means."""

from __future__ import annotations

from typing import ClassVar

import pytest

from sidestepd.samplers.visible import device_number, visible_devices

A, B, C = "GPU-aa11", "GPU-ab22", "GPU-cc33"
MIG = "MIG-dd44"
ALL = [A, B, C, MIG]


class TestVisibleDevices:
    @pytest.mark.parametrize(
        ("variable", "seen"),
        [
            (None, [A, B, C]),
            ("", []),
            ("0", [A]),
            ("2,0", [C, A]),
            (" 1 , 2 ", [B, C]),
            ("GPU-cc33,0", [C, A]),
            ("GPU-cc", [C]),
            ("gpu-cc33", []),
            ("GPU-a", []),  # fits two
            ("GPU-", []),
            ("MIG-dd44", [MIG]),
            ("MIG-GPU-cc33/1/0", [C]),
            ("MIG-GPU-ee/1/0,0", []),
            ("0,-1,2", [A]),
            ("0,9,2", [A]),
            ("0,x,2", [A]),
            ("NoDevFiles", []),
            ("0,0", []),
            ("0,GPU-aa11", []),
        ],
    )
    def test_are_those_that_cuda_takes(self, variable: str | None, seen: list[str]) -> None:
        assert seen == visible_devices(variable, ALL)


class TestDeviceNumber:
    GPUS: ClassVar = {A: 0, B: 1, C: 2, MIG: 2}

    @pytest.mark.parametrize("device", [C, "GPU-CC33", "cc33", MIG])
    def test_is_known_by_the_uuid(self, device: str) -> None:
        assert 2 == device_number(ordinal=0, device=device, visible=None, gpus=self.GPUS)

    def test_else_by_what_is_visible(self) -> None:
        assert 2 == device_number(ordinal=1, device=None, visible="0,2", gpus=self.GPUS)
        assert 2 == device_number(ordinal=0, device=None, visible=MIG, gpus=self.GPUS)

    def test_without_nvml_is_the_number_that_was_given(self) -> None:
        assert 5 == device_number(ordinal=1, device="GPU-unheard-of", visible="3,5", gpus={})
        assert 1 == device_number(ordinal=1, device=None, visible=None, gpus={})
