"""Where images and statistics come from."""
