"""Teachers: the models whose features a student learns, and how their weights are made."""
