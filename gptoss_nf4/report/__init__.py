"""What a run leaves to look at: the data of DVC's plots, and a report of one HTML file. Nothing is computed from weights.

- `series.py`: the numbers that are drawn, from what the stages wrote. `dvc plots show` and the report draw the same ones.
- `facts.py`: everything that the report tells, read from the files of the stages; what is missing is said.
- `chart.py`: one chart as inline SVG: a pure function.
- `page.py`: the page in one function, from `templates/`. Jinja2 escapes every text.

May import `storage`. Imported by the stages only.
"""
