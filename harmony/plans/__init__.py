"""Plans as people meet them: asked for on the command line, shown, explained, kept in files."""
