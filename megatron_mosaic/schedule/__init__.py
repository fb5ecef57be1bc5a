"""When it runs: tasks as data, their order, its verification."""
