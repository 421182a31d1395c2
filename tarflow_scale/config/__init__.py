"""Configuration: pydantic sections, one YAML file per run, ``section.key=value`` overrides. Imports no torch, no ray.

Each verb has a module with its root section and the sections that only this verb reads. Sections that several verbs
share are in ``data``, ``model``, ``sampling``, ``versions``, ``cluster`` and ``protocols``. ``base`` reads a
configuration. ``manual`` formats the docstrings of the sections for ``VERB --help``.
"""
