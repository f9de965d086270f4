"""The doctor: what is installed, what a job would run on, and what is wrong with it."""
