"""From measured sensitivities to bits: rankings, exact budgets, the whole front, and how good each prediction is."""
