"""Every figure, table and claim of the five texts: what it says, what it is here, how to run it."""
