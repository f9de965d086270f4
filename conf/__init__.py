"""Configuration groups; ``hybridpar.config`` reads them."""
