"""From chain, profile and cluster to a plan, and from a plan to a program. Imports no torch."""
