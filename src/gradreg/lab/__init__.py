"""The laboratory: small tasks that run on a laptop, and what each method measures on them."""
