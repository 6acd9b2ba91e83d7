"""Routing counted and what it specialises in, exposure bias, the budget of a run."""
