"""The loop: what runs next, running it, and handing out what came of it."""
