"""Search: which scheme for which layer, under budgets of MACs, BOPs, bytes or latency.

space = SearchSpace(layers, fixed={Metric.LATENCY: 0.4})
plan = solve_milp(space, "latency:4x,size:6x")
plan = refine(plan, space, "latency:4x,size:6x", evaluate, seconds=600).plan
"""

from obc_deploy.search.budgets import Budget, Budgets, Metric, as_budgets
from obc_deploy.search.changes import ChangeCosts
from obc_deploy.search.choices import Choice, LayerChoices, Plan, SearchSpace, counted_costs
from obc_deploy.search.dynamic import solve_dynamic
from obc_deploy.search.milp import solve_milp
from obc_deploy.search.reachable import best_reachable
from obc_deploy.search.refine import Evaluation, Move, Refinement, refine

__all__ = [
    "Budget",
    "Budgets",
    "ChangeCosts",
    "Choice",
    "Evaluation",
    "LayerChoices",
    "Metric",
    "Move",
    "Plan",
    "Refinement",
    "SearchSpace",
    "as_budgets",
    "best_reachable",
    "counted_costs",
    "refine",
    "solve_dynamic",
    "solve_milp",
]
