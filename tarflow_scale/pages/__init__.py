"""Pages about registries, runs and generated data, as Markdown and as one HTML file.

`ranking` orders the numbers that share a protocol id, `answers` puts the conclusion in a sentence, `runs` reads run
folders, `charts` and `pictures` draw, `numbers` formats numbers, `markdown` and `html` write pages. Texts of a
registry were written by other people, so they are escaped, and the page runs no script but its own.
"""
