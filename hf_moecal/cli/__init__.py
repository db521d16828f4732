"""The `moecal` command line: commands, recipes, the runs that carry them out, and plans made beforehand."""
