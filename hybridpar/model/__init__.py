"""Models as chains of layers."""
