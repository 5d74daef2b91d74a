"""What goes on beside a run's steps: signals and standstill (watch.py), writing a copy of the state (writer.py)."""
