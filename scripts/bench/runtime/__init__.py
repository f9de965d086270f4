"""The runtime against what one would write or take instead: the same work on the same ranks, in turns."""
