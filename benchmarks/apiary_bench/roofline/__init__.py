"""How far a step is from what the hardware allows: `apiary bench roofline`."""
