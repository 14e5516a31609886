"""Files that several processes run at once, each for one test file; see ``tests.helpers.processes``."""
