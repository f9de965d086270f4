"""Runs programs: modules on their ranks, communication, the executor and the training loop."""
