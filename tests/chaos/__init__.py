"""Breaking things: real signals to the real processes of real runs."""
