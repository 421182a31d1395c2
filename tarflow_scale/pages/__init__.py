"""Pages that people look at: rankings of registries' numbers, as Markdown and as one self-contained HTML file."""
