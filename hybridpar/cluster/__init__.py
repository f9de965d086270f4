"""What each device and link of a cluster can do."""
