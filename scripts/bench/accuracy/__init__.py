"""How close the planner's predictions come to what is then measured; see docs/accuracy.md."""
