"""What the GPUs did while a job ran: utilisation, occupancy and memory, sampled by a process of its own."""
