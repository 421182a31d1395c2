"""Scripts that measure and disturb: ``python evals/benchmarks/NAME.py`` or ``python -m evals.benchmarks.NAME``.

Both need the package installed as ``pip install --editable .`` does, which puts the checkout on Python's path.
"""
