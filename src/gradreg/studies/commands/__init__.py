"""The commands of the studies; importing this adds them to the app."""

from gradreg.studies.commands import claims, experiments, frontier, gpu, hacking, images

__all__ = ["claims", "experiments", "frontier", "gpu", "hacking", "images"]
