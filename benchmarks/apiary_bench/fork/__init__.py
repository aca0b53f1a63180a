"""What forks of a session cost, and that all of them answer."""
