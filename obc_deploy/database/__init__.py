"""The database: every layer at every level, solved once, packed tightly, kept on disk."""

from obc_deploy.database.building import build
from obc_deploy.database.compounds import choice_error, stored_form, stored_levels
from obc_deploy.database.families import Family, as_families
from obc_deploy.database.levels import block4_sparsities, levels_for, sparsity_grid
from obc_deploy.database.outline import LayerOutline, outline_of_layer, outline_of_problem
from obc_deploy.database.plan import BuildPlan, LayerPlan, plan_build
from obc_deploy.database.store import Database, LayerSize, SizeReport

__all__ = [
    "BuildPlan",
    "Database",
    "Family",
    "LayerOutline",
    "LayerPlan",
    "LayerSize",
    "SizeReport",
    "as_families",
    "block4_sparsities",
    "build",
    "choice_error",
    "levels_for",
    "outline_of_layer",
    "outline_of_problem",
    "plan_build",
    "sparsity_grid",
    "stored_form",
    "stored_levels",
]
