"""Compare: the same training with several batch schedules, and what that showed."""
