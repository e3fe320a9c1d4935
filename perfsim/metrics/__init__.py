"""From the simulator's records to the one output type, `Result`."""
