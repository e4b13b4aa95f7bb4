"""A slide in the browser: with its labels, how good they are, and how a training step goes over it."""
