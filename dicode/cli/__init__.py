"""The command line: flags, and what each command does with the library."""
