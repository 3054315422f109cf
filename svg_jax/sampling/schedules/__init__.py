"""The samplers: tables of numbers made on the host, and one step of each on the device."""
