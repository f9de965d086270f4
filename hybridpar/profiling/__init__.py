"""What each layer costs: measured on a device, or estimated from its data sheet."""
