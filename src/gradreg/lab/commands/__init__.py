"""The commands, as `gradreg` knows them: one file for those that belong together; importing it adds them to the app."""

from gradreg.lab.commands import compare, cost, report, sharpness, sweep, train
from gradreg.lab.commands.options import LAST_SEED, app

__all__ = ["LAST_SEED", "app", "compare", "cost", "report", "sharpness", "sweep", "train"]
