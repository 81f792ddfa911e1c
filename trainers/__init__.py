"""Training of retaining heads with Lightning."""
