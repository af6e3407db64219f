"""What the database tests share."""

from __future__ import annotations

import pytest

from obc_deploy.database import building


@pytest.fixture
def solved(monkeypatch):
    """(layer, schemes) of every call of the solver by a build, in order."""
    calls = []
    real = building.solve_levels

    def counted(problem, schemes, **options):
        calls.append((problem.name, [str(scheme) for scheme in schemes]))
        return real(problem, schemes, **options)

    monkeypatch.setattr(building, "solve_levels", counted)
    return calls
