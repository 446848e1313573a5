"""What an inner optimizer does to the entries of its parameters, read off its jaxpr; it is never evaluated there."""
