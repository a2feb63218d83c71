"""A report of a run's saves: `gather` reads what there is, `page` makes one HTML page of it."""
