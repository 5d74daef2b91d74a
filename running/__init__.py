"""What goes on beside a run's steps: files that are whole or not there (files.py), signals and standstill (watch.py),
writing a copy of the state (writer.py), loggers of others (loggers.py)."""
