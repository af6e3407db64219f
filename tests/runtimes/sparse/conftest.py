from __future__ import annotations

import pytest
from sparse_models import Graph


@pytest.fixture(params=["nodes", "regions"], autouse=True, scope="session")
def form(request: pytest.FixtureRequest) -> str:
    """Everything is tested twice: operators as nodes of their own, and as parts of regions."""
    Graph.joined = request.param == "regions"
    return str(request.param)
