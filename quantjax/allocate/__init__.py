"""Which layer hurts, and how many bits should each have? Sensitivity and bit allocation."""
