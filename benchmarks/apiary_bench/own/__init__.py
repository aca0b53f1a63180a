"""Workers that a measurement starts for itself, and turns of their sessions."""
