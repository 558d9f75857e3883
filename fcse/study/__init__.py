"""The study: grids of runs, reports over seeds, findings, and what was published."""
