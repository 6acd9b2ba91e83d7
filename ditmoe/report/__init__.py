"""A run's page: facts, template, charts, maps."""
