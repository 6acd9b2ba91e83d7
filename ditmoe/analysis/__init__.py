"""Routing counted, exposure bias, the budget of a run."""
