"""A study that workers share, wherever they are: what they ask of its plan, and who has which run."""
