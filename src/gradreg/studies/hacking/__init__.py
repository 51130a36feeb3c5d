"""Does the penalty keep a policy from hacking its reward? A small one, whose true reward is known."""
