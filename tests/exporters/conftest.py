from __future__ import annotations

import pytest
from exported import Compressed


@pytest.fixture(scope="session")
def compressed() -> Compressed:
    """Compressed tiny networks, each made once."""
    return Compressed()
