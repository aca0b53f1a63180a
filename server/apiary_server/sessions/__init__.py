"""Sessions and the memory that they lease."""
