"""Read a run folder: traces to Perfetto, tables and a report. Needs no torch."""
