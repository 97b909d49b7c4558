"""Which sample when, with which noise."""
