"""What a job did, for people: reads records only."""
