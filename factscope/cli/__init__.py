"""The command line: thin over the same ``run`` functions as the pages, so its numbers are the pages' numbers.

Exit status: 0 on success; 2 for input that cannot be used, with one line on standard error; 3 for a run that was
stopped; 1 for a defect of ours, with the traceback in a log file. The reference is docs/command-line.md.
"""

from factscope.cli.program import main

__all__ = ["main"]
