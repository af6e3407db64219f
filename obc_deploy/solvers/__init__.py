"""Solvers: one algorithm, one file, all behind the contract in `contract.py`."""
