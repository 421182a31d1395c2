"""Pages about registries, runs and generated data, as Markdown and as one HTML file.

`ranking` orders the numbers that share a protocol id, `answers` writes the conclusion as a sentence, `runs` reads run
folders, `charts` and `pictures` draw, `numbers` formats numbers, `markdown` and `html` write pages. The texts in a
registry are untrusted, so they are escaped, and the page runs only its own script.
"""
