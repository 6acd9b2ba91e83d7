"""Images in memory, sets on disk, grids and strips."""
