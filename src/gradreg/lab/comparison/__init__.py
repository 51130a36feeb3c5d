"""Does a method help on a task? A baseline that is tuned first, equal budgets, one reading of the test rows."""
