"""SimPy pieces that the simulators share: a counting environment, links with fair sharing, pools, failures."""
