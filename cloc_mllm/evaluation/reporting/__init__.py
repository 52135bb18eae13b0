"""What people and programs read: reports, and what they say of data and versions."""
