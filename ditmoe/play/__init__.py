"""A page to play with: what it asks for, who draws it, how it is served."""
