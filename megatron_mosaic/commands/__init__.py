"""What the command line does, one command in each module."""
