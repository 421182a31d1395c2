"""Pages about registries, runs and generated data, as Markdown and as one HTML file.

`ranking` ranks the numbers of each protocol id, `answers` summarises them in sentences, `runs` reads run folders,
`charts` draws curves, `numbers` formats numbers, `markdown` and `html` render the page. Text from a registry is
untrusted, so it is escaped, and the page runs no script but its own.
"""
