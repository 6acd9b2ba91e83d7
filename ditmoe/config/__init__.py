"""What a run is: frozen dataclasses, presets, and their files. Imports no torch."""
