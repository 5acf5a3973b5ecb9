"""Faults in real swarms: `python -m tests.chaos --trials N --seed S --json`."""
