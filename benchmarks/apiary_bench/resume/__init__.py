"""How soon sessions answer after their worker was started again."""
