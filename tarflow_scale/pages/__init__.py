"""Pages that people look at: rankings of registries' numbers, as Markdown and as one self-contained HTML file.

`ranking` orders the numbers that share a protocol id, `markdown` and `html` write them, `charts` draws curves. What
comes from a registry is text that somebody else wrote, so it is escaped, and the page runs no script but its own.
"""
