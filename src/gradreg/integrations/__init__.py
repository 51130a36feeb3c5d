"""One file for each framework, each an optional extra that is imported only there."""
