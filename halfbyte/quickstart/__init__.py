"""The tour: a task the starter model cannot do, learnt in minutes, with rows made by the project's own seeded generator."""
