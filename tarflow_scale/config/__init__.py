"""Configuration: pydantic sections, one YAML file for each run, ``section.key=value`` overrides. Imports nothing heavy.

Each verb has a file with its root section and the sections that only it reads. ``data``, ``model``, ``sampling``,
``versions``, ``cluster`` and ``protocols`` have sections that several verbs share; ``base`` reads a configuration,
and ``manual`` prints every key with its default and meaning, from the docstrings of the sections (``VERB --help``).
"""
