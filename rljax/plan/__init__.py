"""Plan before you pay: what an experiment needs of a machine that nobody has to have yet, and how fast it could be."""

from rljax.plan.configs import describe
from rljax.plan.estimate import Block, Exchange, Plan, plan
from rljax.plan.meshes import Found, search
from rljax.plan.tables import as_json, ranking, setting, show
from rljax.plan.topologies import Chip, Machine, machine

__all__ = [
    "Block",
    "Chip",
    "Exchange",
    "Found",
    "Machine",
    "Plan",
    "as_json",
    "describe",
    "machine",
    "plan",
    "ranking",
    "search",
    "setting",
    "show",
]
