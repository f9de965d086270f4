"""What to change about a run: evidence of its measurements, and the planner's prediction of every remedy."""
