"""The tasks of the demo: two data sets with a model for each, clean labels or a share of random ones."""

from __future__ import annotations

from gradreg.lab.config import RunConfig

RANDOM_SHARE = 0.25

# Few training rows: regularization shows where a model over-fits.
TASKS: dict[str, RunConfig] = {
    task.task: task
    for share in (0.0, RANDOM_SHARE)
    for task in (
        RunConfig(data="digits", model="cnn", random_labels=share, num_train=300, batch_size=50, epochs=25),
        RunConfig(data="mnist1d", model="mlp", random_labels=share, num_train=4000, batch_size=100, epochs=30),
    )
}
