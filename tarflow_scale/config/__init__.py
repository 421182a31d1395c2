"""Configuration: pydantic sections, one YAML a run, ``section.key=value`` overrides. Nothing heavy is imported.

Each verb has a file with its root section and the sections that only it reads. ``data``, ``model``, ``sampling``,
``registry``, ``cluster`` and ``protocols`` have sections that several verbs share; ``base`` reads a configuration,
and ``manual`` prints every key with its default and meaning, the docstrings of the sections (``VERB --help``).
"""
