"""Where rayward runs: the one connection to Ray, and what the cluster offers."""
