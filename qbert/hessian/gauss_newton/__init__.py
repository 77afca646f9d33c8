"""The generalized Gauss-Newton matrix of every block: its factor by samples, and its top eigenpair."""
