"""Does a method help? A baseline that is tuned first and last, equal budgets beside it, one look at the test rows."""
