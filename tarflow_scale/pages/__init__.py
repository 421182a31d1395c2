"""Pages that people look at: what registries, runs and generated data hold, as Markdown and as one HTML file.

`ranking` orders the numbers that share a protocol id, `answers` says in a sentence what follows, `runs` reads run
folders, `charts` draws curves, `numbers` writes numbers, `markdown` and `html` put it on a page. What comes from a
registry is text that somebody else wrote, so it is escaped, and the page runs no script but its own.
"""
