"""Packed models in the runtimes of others: recorded once in plain operators, checked, and handed over in low bits."""
