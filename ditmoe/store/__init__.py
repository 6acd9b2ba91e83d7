"""Networks larger than the memory: experts that stay on the disk until a token asks for them."""
