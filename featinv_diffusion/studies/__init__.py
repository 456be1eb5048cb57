"""Studies: each measures something about an inverter or a backbone and gives a result."""
