"""Image sets, their order, pixels, VAE, encoding."""
