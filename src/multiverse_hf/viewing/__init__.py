"""Results as one page for a browser, and their timelines as pictures."""
