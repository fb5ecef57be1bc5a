"""Set-up that all tests share."""

import pytest

from tests.ranks import start_server


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the server of rank processes, so that it imports while the first tests run."""
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    if (
        any(hasattr(module, "run_ranks") for module in modules)
        and not session.config.option.collectonly
    ):
        start_server()
