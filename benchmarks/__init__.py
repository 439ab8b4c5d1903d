"""One script a claim of the README, each side by side with its peers in one run."""
