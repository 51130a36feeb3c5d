"""A loop of the user's that is played here, and keeps what it was asked."""

import math

QUICK = {"trials": 6, "seeds": 3, "workers": 1}


def quality(run):
    """Best at a learning rate of 0.01; F-GR adds a little, most at a ratio of 0.3; seeds are noise."""
    found = -((math.log10(run.learning_rate) + 2) ** 2) + 0.01 * ((run.seed * 7919) % 5)
    if run.method == "F-GR":
        found += 0.5 - (math.log10(run.config.ratio or 1e-9) - math.log10(0.3)) ** 2
    return found


class Recorder:
    """A loop that keeps what it was asked."""

    def __init__(self, sign=1.0, on_test=0.0):
        self.runs, self.sign, self.on_test = [], sign, on_test

    def __call__(self, run):
        self.runs.append(run)
        found = self.sign * quality(run)
        return {"validation": found, "test": found + self.on_test}


def of(runs, **fields):
    return [r for r in runs if all(getattr(r, name) == value for name, value in fields.items())]
