"""How fast FactScope is, against what a user would write without it. Numbers are compared before anything is timed."""
