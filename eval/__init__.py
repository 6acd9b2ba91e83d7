"""Scores of image sets: sources of images, feature extractors, distances. Knows only images."""
