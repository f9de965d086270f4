"""Data sets, the order of their samples, and what one rank reads of every step.

``spec`` says which data set and how; ``datasets`` checks and loads it; ``sampler`` fixes the order of an epoch
without knowing the plan; ``stream`` has both for data without random access; ``loader`` reads, for one rank, the
samples that the plan gives it.
"""
