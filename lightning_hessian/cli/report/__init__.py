"""``lightning-hessian report``: compare finished runs in a table, in plots, and on one page."""
