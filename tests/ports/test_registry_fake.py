"""The fake Registry keeps the port's contract, so what is tested with it holds with a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.ports import ModelVersion, PortError
from tests.fakes.inspector import MODEL
from tests.fakes.registry import FakeRegistry
from tests.ports.registry_contract import MakeModel, RegistryContract


class TestFakeRegistry(RegistryContract):
    @pytest.fixture
    def registry(self, tmp_path: Path) -> FakeRegistry:
        return FakeRegistry(tmp_path / "registry")

    @pytest.fixture
    def make_model(self, tmp_path: Path) -> MakeModel:
        def make(seed: int) -> Path:
            path = tmp_path / f"model-{seed}.onnx"
            path.write_bytes(MODEL + str(seed).encode())
            return path

        return make

    @pytest.fixture
    def damage(self, registry: FakeRegistry) -> Callable[[ModelVersion], None]:
        return registry.damage

    def test_down_means_down(self, registry: FakeRegistry) -> None:
        registry.down = True
        with pytest.raises(PortError):
            registry.versions("m")
