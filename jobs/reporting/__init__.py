"""What `jobs.report` computes of a scored corpus, and the page it makes of it."""
