"""Tables to sentences, figures and a page: findings by rules, report.html, summary.json, compare.

In: tables and the run folder's JSON. Out: files in the run folder, lines in the terminal.
"""
