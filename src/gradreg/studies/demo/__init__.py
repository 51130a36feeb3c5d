"""The demo: its tasks, the choice of its hyper-parameters, its table and page."""
