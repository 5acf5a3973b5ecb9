"""Guessing what comes next, so that one trip through the swarm brings several tokens."""
